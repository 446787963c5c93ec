// The form of all options: `props.value` is { preset: { name: text }, told: { name: text } }. Fields are filled where the server sets it,
// and what is typed goes back into it. Nothing here knows an option by name.
const fields = new Map([...element.querySelectorAll("[data-option]")].map((field) => [field.dataset.option, field]));
const search = element.querySelector("[type=search]");
const onlyChanged = element.querySelector(".only-changed");

const read = (field) => (field.type === "checkbox" ? String(field.checked) : field.value);

function write(field, text) {
  if (field.type === "checkbox") field.checked = text === "true";
  else field.value = text;
}

function changed(name) {
  return read(fields.get(name)) !== (props.value.preset[name] ?? "");
}

function mark() {
  for (const name of fields.keys()) fields.get(name).closest(".sd-option").classList.toggle("changed", changed(name));
  for (const section of element.querySelectorAll("details")) {
    const count = section.querySelectorAll(".changed").length;
    section.querySelector(".count").textContent = count ? `${count} changed` : "";
  }
}

function find() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const seeking = words.length > 0 || onlyChanged.checked;
  let any = false;
  for (const section of element.querySelectorAll("details")) {
    let found = false;
    for (const option of section.querySelectorAll(".sd-option")) {
      const text = `${option.dataset.name} ${option.textContent}`.toLowerCase();
      const shown = words.every((word) => text.includes(word)) && (!onlyChanged.checked || option.classList.contains("changed"));
      option.hidden = !shown;
      found ||= shown;
    }
    section.hidden = !found;
    if (seeking) section.open = found;
    any ||= found;
  }
  element.querySelector(".sd-none").hidden = any;
}

function fill() {
  for (const [name, field] of fields) {
    const text = props.value.told[name] ?? props.value.preset[name] ?? "";
    if (read(field) !== text) write(field, text);
  }
  mark();
  find();
}

function tell() {
  const told = {};
  for (const [name, field] of fields) if (changed(name)) told[name] = read(field);
  props.value = { preset: props.value.preset, told };
  mark();
  trigger("change");
}

element.addEventListener("input", (event) => (event.target.dataset.option ? tell() : find()));
element.addEventListener("click", (event) => {
  if (!event.target.matches(".reset")) return;
  const name = event.target.closest(".sd-option").dataset.name;
  write(fields.get(name), props.value.preset[name] ?? "");
  tell();
});
watch("value", fill);
fill();
