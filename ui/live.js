// A run as it goes: `props.value` has what is new of it, by the ids of its places.
function put() {
  for (const [part, html] of Object.entries(props.value)) element.querySelector(`#${part}`).innerHTML = html;
}
watch("value", put);
put();
