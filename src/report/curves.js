// The charts, alive: how much they are smoothed, and the numbers under the pointer. The lines that stand in the page already are smoothed over about
// ten steps; this redraws them in the frame they have.
{
  const WINDOWS = [1, 2, 3, 5, 10, 20, 50, 100, 200];
  const figures = [...document.querySelectorAll("[data-curve]")];
  let chosen = null;

  /** The same average as in the page's own drawing: exponential, corrected for its start. */
  const smooth = (values, keep) => {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      if (value !== null) {
        sum = keep * sum + (1 - keep) * value;
        weight = keep * weight + (1 - keep);
      }
      return weight > 0 ? sum / weight : null;
    });
  };

  const keepOf = (count) => (chosen === null ? Math.min(0.9, Math.max(0, 1 - 10 / count)) : 1 - 1 / chosen);

  /** Step, mean, lowest and highest of an experiment's runs, at the steps that all of them have. */
  const course = (line) => {
    const runs = line.runs.map(([x, y]) => {
      const smoothed = line.exact ? y : smooth(y, keepOf(y.length));
      return new Map(x.map((step, at) => [step, smoothed[at]]));
    });
    return line.runs[0][0]
      .filter((step) => runs.every((run) => run.has(step) && run.get(step) !== null))
      .map((step) => {
        const values = runs.map((run) => run.get(step));
        return { step, mean: values.reduce((a, b) => a + b) / values.length, low: Math.min(...values), high: Math.max(...values) };
      });
  };

  const frameOf = (chart) => {
    const [first, last, bottom, top] = chart.dataset.axes.split(" ").map(Number);
    const [left, right, above, below] = chart.dataset.frame.split(" ").map(Number);
    const x = (step) => left + (last > first ? (step - first) / (last - first) : 0.5) * (right - left);
    const y = (value) => below - ((value - bottom) / (top - bottom)) * (below - above);
    return { x, y, first, last, left, right, above, below };
  };

  const path = (points) => points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  const redraw = (figure) => {
    const curve = report.curves[figure.dataset.curve];
    const chart = figure.querySelector("svg");
    const { x, y } = frameOf(chart);
    const percent = (value) => (curve.share ? `${(value * 100).toFixed(1)} %` : short(value));
    const lines = chart.querySelectorAll(".line");
    const bands = chart.querySelectorAll(".band");
    const ends = figure.querySelectorAll("figcaption b");
    let band = 0;
    curve.lines.forEach((line, at) => {
      const points = course(line);
      if (points.length === 0) return;
      lines[at].setAttribute("d", path(points.map(({ step, mean }) => [x(step), y(mean)])));
      if (line.runs.length > 1 && bands[band]) {
        const upper = points.map(({ step, high }) => [x(step), y(high)]);
        const lower = points.map(({ step, low }) => [x(step), y(low)]).reverse();
        bands[band++].setAttribute("d", `${path([...upper, ...lower])}Z`);
      }
      const end = points[points.length - 1];
      ends[at].textContent = percent(end.mean);
      const dots = chart.querySelectorAll(`circle.s${line.colour}`);
      if (dots.length === 1) {
        dots[0].setAttribute("cx", x(end.step));
        dots[0].setAttribute("cy", y(end.mean));
      }
    });
  };

  const legend = document.getElementById("curve-legend");
  if (legend && figures.some((figure) => report.curves[figure.dataset.curve].lines.some((line) => line.runs[0][0].length > 3))) {
    const said = element("output", {}, "about 10 steps");
    const slider = element("input", {
      type: "range", min: 0, max: WINDOWS.length - 1, value: 4, id: "smoothing",
      input: () => {
        chosen = WINDOWS[slider.value];
        said.textContent = chosen === 1 ? "none" : `about ${chosen} steps`;
        figures.forEach(redraw);
      },
    });
    legend.prepend(element("label", { class: "smoothing", for: "smoothing" }, "smoothing ", slider, said));
  }

  for (const figure of figures) {
    const chart = figure.querySelector("svg");
    const curve = report.curves[figure.dataset.curve];
    const mark = drawing("path", { class: "cursor" });
    chart.append(mark);
    chart.addEventListener("pointermove", (event) => {
      const frame = frameOf(chart);
      const box = chart.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const share = Math.min(1, Math.max(0, (place - frame.left) / (frame.right - frame.left)));
      const wanted = frame.first + share * (frame.last - frame.first);
      const steps = curve.lines.flatMap((line) => line.runs.flatMap(([x]) => x));
      const step = steps.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best), steps[0]);
      mark.setAttribute("d", `M${frame.x(step).toFixed(1)} ${frame.above}V${frame.below}`);
      const rows = [["step", String(step)]];
      for (const line of curve.lines) {
        const name = curve.lines.length > 1 ? line.label : "value";
        const values = line.runs.map(([x, y]) => y[x.indexOf(step)]).filter((value) => value !== undefined && value !== null);
        if (values.length === 0) continue;
        rows.push([name, values.map((value) => short(value, 4)).join(" · "), `s${line.colour}`]);
        const point = line.exact ? null : course(line).find((one) => one.step === step);
        if (point) rows.push(["smoothed", short(point.mean, 4), `s${line.colour}`]);
      }
      showTip(rows, event.clientX, event.clientY);
    });
    chart.addEventListener("pointerleave", () => {
      mark.removeAttribute("d");
      hideTip();
    });
  }
}
