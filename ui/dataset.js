// Captions under their pictures: what is typed is written when the field is left.
const captions = () => element.querySelectorAll("textarea");
const show = () => captions().forEach((field) => (field.value = field.dataset.caption));

element.addEventListener("change", async (event) => {
  const field = event.target;
  const folder = element.querySelector("[data-folder]").dataset.folder;
  const problem = await server.write_one({ folder, name: field.dataset.name, caption: field.value });
  field.closest("figure").querySelector("output").textContent = problem || "Saved";
  field.closest("figure").classList.toggle("wrong", Boolean(problem));
  if (!problem) field.dataset.caption = field.value;
});
watch("value", show);
show();
