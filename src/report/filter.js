// Filters the episodes by verdict, run and step. Without scripts the filters stay hidden and every episode is shown.
(() => {
  const bar = document.querySelector(".filters");
  if (!bar) return;
  bar.hidden = false;
  const cards = [...document.querySelectorAll(".episode")];
  const wanted = { verdict: "", run: "", step: "" };
  const apply = () => {
    let shown = 0;
    for (const card of cards) {
      const fits = Object.keys(wanted).every((key) => wanted[key] === "" || card.dataset[key] === wanted[key]);
      card.hidden = !fits;
      shown += fits;
    }
    bar.querySelector("output").textContent = shown;
  };
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    wanted.verdict = button.dataset.verdict;
    for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    apply();
  });
  bar.addEventListener("change", (event) => {
    wanted[event.target.name] = event.target.value;
    apply();
  });
})();
