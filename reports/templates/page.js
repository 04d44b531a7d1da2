"use strict";
const figures = [...document.querySelectorAll(".figure")];
const drawn = () => figures.filter(box => box.data);

/* A plot has the page's colours, of the light or of the dark one. */
function inPageColors(layout) {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = {gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--faint"), automargin: true};
  const own = {
    paper_bgcolor: css("--card"), plot_bgcolor: css("--card"), font: {...layout.font, color: css("--faint")},
    margin: {l: 50, r: 14, t: 40, b: 40, ...layout.margin},
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink")}},
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, ...layout.legend},
  };
  if (layout.title) own.title = {x: 0.02, ...layout.title, font: {...layout.title.font, color: css("--ink")}};
  for (const name in layout)
    if (/^[xy]axis\d*$/.test(name)) own[name] = {...layout[name], ...axis};
  return {...layout, ...own};
}

function draw(box) {
  const {data, layout} = JSON.parse(box.nextElementSibling.textContent);
  if (!box.data) box.textContent = "";
  Plotly.react(box, data, inPageColors(layout), {
    responsive: true, displaylogo: false, showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    toImageButtonOptions: {scale: 2, filename: box.ariaLabel},
  });
}

if (window.Plotly && figures.length) {
  const arrival = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(entry => {
    arrival.unobserve(entry.target);
    draw(entry.target);
  }), {rootMargin: "800px"});
  figures.forEach(box => arrival.observe(box));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn().forEach(draw));
  addEventListener("beforeprint", () => figures.forEach(draw));
}

/* Resting on the row of a run lights up its curves. */
document.querySelectorAll("tr[data-run]").forEach(row => {
  const light = number => drawn().filter(box => box.data.some(trace => trace.meta !== undefined)).forEach(box =>
    Plotly.restyle(box, {opacity: box.data.map(trace => number === null || trace.meta === number ? 1 : .12)}));
  row.addEventListener("mouseenter", () => light(Number(row.dataset.run)));
  row.addEventListener("mouseleave", () => light(null));
});

/* A click on a column's name sorts by it, the better end first, then the other way. */
const amount = (row, i) => Number(row.cells[i].textContent.replace(/[,★]/g, "") || NaN);
document.querySelectorAll(".sorts th:not(:first-child)").forEach(head => {
  let sign = head.textContent.includes("↑") ? -1 : 1;
  head.addEventListener("click", () => {
    const i = head.cellIndex, rows = [...head.closest("table").querySelectorAll("tr[data-run]")];
    const known = row => !Number.isNaN(amount(row, i));
    rows.sort((a, b) => known(b) - known(a) || (known(a) ? sign * (amount(a, i) - amount(b, i)) : 0));
    rows.forEach(row => row.parentNode.append(row));
    sign = -sign;
  });
});
