"use strict";
(() => {
  const root = document.documentElement, theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.ariaLabel = `switch to ${dark() ? "light" : "dark"} colours`; };
  theme.onclick = () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch {}
    name();
  };
  name();
  const contents = document.querySelector(".contents details");
  if (contents && matchMedia("(max-width: 900px)").matches) contents.open = false;
  // what scrolls on its own can be reached and scrolled by keyboard
  const reach = () => document.querySelectorAll(".wide, .figure").forEach(box => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; else box.removeAttribute("tabindex");
  });
  addEventListener("load", reach);
  addEventListener("resize", reach);
  const value = cell => {
    const text = cell.textContent.trim().replace(/−/g, "-"), number = text.match(/^[<+]?\s*(-?[\d,]*\.?\d+(e[+-]?\d+)?)/i);
    return number ? Number(number[1].replace(/,/g, "")) : text === "" || text === "–" ? null : text.toLowerCase();
  };
  const compare = (one, other) => {
    if (one === null || other === null) return 0;
    return typeof one === typeof other ? (one < other ? -1 : one > other ? 1 : 0) : typeof one === "number" ? -1 : 1;
  };
  document.querySelectorAll("table.sorts").forEach(table => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.onclick = () => {
        const down = head.ariaSort === "ascending";
        heads.forEach(one => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map(row => [value(row.cells[column]), row]);
        const there = rows.filter(([found]) => found !== null).sort(([one], [other]) => compare(one, other) * (down ? -1 : 1));
        table.tBodies[0].append(...there.concat(rows.filter(([found]) => found === null)).map(([, row]) => row));
      };
    });
  });
})();
