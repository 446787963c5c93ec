// Captions under their pictures: what is typed is written when the field is left, and kept by the browser until then.
const captions = () => element.querySelectorAll("textarea");
const folder = () => element.querySelector("[data-folder]").dataset.folder;
const draft = (field) => `sdlora-caption ${folder()} ${field.dataset.name}`;

function show() {
  for (const field of captions()) {
    const typed = localStorage.getItem(draft(field));
    field.value = typed ?? field.dataset.caption;
    if (typed !== null) field.closest("figure").querySelector("output").textContent = "Not saved yet";
  }
}

element.addEventListener("input", (event) => localStorage.setItem(draft(event.target), event.target.value));
element.addEventListener("focusout", save);

async function save(event) {
  const field = event.target;
  const kept = draft(field);
  if (localStorage.getItem(kept) === null) return;
  const problem = await server.write_one({ folder: folder(), name: field.dataset.name, caption: field.value });
  field.closest("figure").querySelector("output").textContent = problem || "Saved";
  field.closest("figure").classList.toggle("wrong", Boolean(problem));
  if (problem) return;
  field.dataset.caption = field.value;
  localStorage.removeItem(kept);
}
watch("value", show);
show();
