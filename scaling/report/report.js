"use strict";
// A click on a column's head sorts its table by that column; a second click turns the order round.
document.addEventListener("click", (event) => {
  const head = event.target.closest("th");
  if (!head) return;
  const body = head.closest("table").tBodies[0];
  const place = head.cellIndex;
  const down = head.dataset.order === "up";
  for (const other of head.parentNode.cells) delete other.dataset.order;
  head.dataset.order = down ? "down" : "up";
  const key = (row) => {
    const cell = row.cells[place];
    const number = cell.dataset.key === undefined ? NaN : Number(cell.dataset.key);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    if (typeof x === typeof y) return typeof x === "number" ? x - y : x.localeCompare(y);
    return typeof x === "number" ? -1 : 1;
  };
  const rows = Array.from(body.rows).sort(compare);
  if (down) rows.reverse();
  body.append(...rows);
});
