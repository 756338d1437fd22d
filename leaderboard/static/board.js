// Sorts a table by the column whose head was pressed: numbers from the highest, words from A. Missing values stay
// last either way; equal lines keep their order. The page works without this script: the lines come ranked.
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const numbers = head.dataset.kind === "number" && !head.matches(":first-child");
    const now = head.getAttribute("aria-sort");
    const falling = now ? now === "ascending" : numbers;
    const value = (line) => line.cells[head.cellIndex].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = head.dataset.kind === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return falling ? -order : order;
    };
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.append(...[...body.rows].sort(compare));
  });
}
