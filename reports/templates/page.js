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

/* An average that forgets: each value counts for `weight` of the one after it. The values themselves stay, pale. */
function smooth(traces, weight) {
  return traces.flatMap(trace => {
    if (!weight || !trace.y || trace.y.length < 3 || trace.line?.dash || trace.fill) return [trace];
    let sum = 0, all = 0;
    const y = trace.y.map(value => (sum = weight * sum + value, all = weight * all + 1, sum / all));
    return [{...trace, mode: "lines", opacity: .25, showlegend: false, hoverinfo: "skip"}, {...trace, y, mode: "lines"}];
  });
}

const smoothing = document.querySelector(".smoothing");

function draw(box) {
  const {data: values, layout} = JSON.parse(box.nextElementSibling.textContent);
  const data = smooth(values, Number(smoothing?.value ?? 0));
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

smoothing?.addEventListener("input", () => {
  smoothing.previousElementSibling.value = smoothing.value;
  drawn().forEach(draw);
});

/* The samples after so many updates. */
document.querySelectorAll(".strip").forEach(strip => {
  const slider = strip.querySelector("input"), frames = [...strip.querySelectorAll("img[data-frames]")];
  const sources = frames.map(image => JSON.parse(image.dataset.frames));
  slider?.addEventListener("input", () => {
    slider.previousElementSibling.value = JSON.parse(slider.dataset.steps)[slider.value].toLocaleString("en");
    frames.forEach((image, i) => image.src = sources[i][slider.value]);
  });
});

/* A click on a picture shows it large. */
document.addEventListener("click", event => {
  if (!event.target.matches("figure img")) return;
  const {src, alt} = event.target, large = document.createElement("dialog"), line = document.createElement("p");
  const image = Object.assign(new Image(), {src, alt});
  const kind = src.slice(0, 40).match(/image\/(\w+)/)?.[1] ?? "png";
  const name = alt.replace(/[^\w]+/g, "_").slice(0, 80) + "." + kind;
  const save = Object.assign(document.createElement("a"), {href: src, download: name, textContent: "Save"});
  const close = Object.assign(document.createElement("button"), {textContent: "Close"});
  close.addEventListener("click", () => large.close());
  large.addEventListener("click", click => { if (click.target === large) large.close(); });
  large.addEventListener("close", () => large.remove());
  line.append(save, close, alt);
  large.append(image, line);
  document.body.append(large);
  large.showModal();
});

/* The values of all curves, as they were before smoothing. */
document.querySelector("button.curves")?.addEventListener("click", () => {
  const quoted = text => '"' + String(text ?? "").replaceAll('"', '""') + '"';
  const rows = figures.flatMap(box => JSON.parse(box.nextElementSibling.textContent).data
    .flatMap(trace => [...(trace.x ?? [])].map((x, i) => [quoted(box.ariaLabel), quoted(trace.name), x, trace.y[i]])));
  const text = [["plot", "curve", "x", "y"], ...rows].map(row => row.join(",")).join("\n") + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  link.download = "curves.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});
