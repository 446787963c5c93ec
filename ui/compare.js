// Two pictures over one another: how much of the first is seen follows the bar.
element.addEventListener("input", (event) => {
  if (event.target.type === "range") event.target.closest("figure").style.setProperty("--at", `${event.target.value}%`);
});
