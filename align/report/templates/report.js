"use strict";
// The answers: filtered and ordered in memory, drawn a page at a time. Everything from the data goes in as text, never as HTML.
(() => {
  const PAGE = 20;
  const byId = (id) => document.getElementById(id);
  const evaluations = JSON.parse(byId("data").textContent);
  const cases = byId("cases"), more = byId("more"), counter = byId("count");
  const filter = byId("filter"), order = byId("order"), judged = byId("judged"), mode = byId("mode"), which = byId("which");
  let rows = [], chosen = [], drawn = 0;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function said(text, extra) {
    const made = element("p", "said" + (extra || ""), text);
    made.dir = "auto";
    return made;
  }

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const number = (value) => (Math.abs(value) < 10000 ? value.toFixed(3) : value.toPrecision(3));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const modes = () => (mode.value === "both" ? ["sampled", "greedy"] : [mode.value]);

  function rewards(row) {
    const names = judged.value === "" ? Object.keys(row.answers) : [judged.value];
    return names
      .map((name) => modes().map((kind) => (row.answers[name] || {})[kind]).map((answer) => answer && answer.reward))
      .map((values) => values.filter(isNumber))
      .filter((values) => values.length)
      .map(mean);
  }

  function start() {
    const models = new Set();
    rows = evaluations[which ? Number(which.value) : 0].rows.map((row, place) => {
      const texts = row.turns.map((turn) => turn[1]);
      for (const [name, answers] of Object.entries(row.answers)) {
        models.add(name);
        for (const answer of Object.values(answers)) if (answer.text) texts.push(answer.text);
      }
      return { ...row, place, words: texts.join("\n").toLowerCase() };
    });
    judged.replaceChildren(new Option("all models", ""), ...[...models].map((name) => new Option(name, name)));
    arrange();
  }

  function arrange() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    chosen = rows.filter((row) => words.every((word) => row.words.includes(word)));
    for (const row of chosen) {
      const values = rewards(row);
      row.score = values.length ? mean(values) : null;
      row.spread = values.length ? Math.max(...values) - Math.min(...values) : null;
    }
    const falling = (key) => (a, b) => (b[key] ?? -Infinity) - (a[key] ?? -Infinity) || a.place - b.place;
    if (order.value === "best") chosen.sort(falling("score"));
    if (order.value === "worst") chosen.sort((a, b) => (a.score ?? Infinity) - (b.score ?? Infinity) || a.place - b.place);
    if (order.value === "spread") chosen.sort(falling("spread"));
    if (order.value === "ends") {
      const sorted = [...chosen].sort(falling("score"));
      chosen = sorted.map((_, i) => (i % 2 ? sorted[sorted.length - 1 - (i - 1) / 2] : sorted[i / 2]));
    }
    cases.replaceChildren();
    drawn = 0;
    draw();
  }

  function draw() {
    const part = chosen.slice(drawn, drawn + PAGE);
    part.forEach((row, i) => cases.append(drawCase(row, drawn === 0 && i < 2)));
    drawn += part.length;
    more.hidden = drawn >= chosen.length;
    more.textContent = `Show more (${chosen.length - drawn} left)`;
    counter.textContent = `${chosen.length} of ${rows.length} prompts, ${drawn} drawn`;
  }

  function drawCase(row, open) {
    const details = element("details"), summary = element("summary");
    const last = row.turns.length ? row.turns[row.turns.length - 1][1] : "";
    if (isNumber(row.score)) summary.append(element("span", "mark", number(row.score)));
    summary.append(element("span", "soft", `${row.place + 1}. `), element("b", "cut", last.slice(0, 400)));
    details.append(summary);
    // What is inside is made when it is opened: most cases never are.
    const fill = () => details.childElementCount === 1 && details.append(drawInside(row));
    details.addEventListener("toggle", () => details.open && fill());
    if (open) {
      details.open = true;
      fill();
    }
    return details;
  }

  function drawInside(row) {
    const inside = element("div"), prompt = element("div", "prompt"), answers = element("div", "answers");
    for (const [role, text] of row.turns) {
      if (role) prompt.append(element("span", "role", role));
      prompt.append(said(text));
    }
    if (row.columns) {
      prompt.append(element("span", "role", "columns"), said(row.columns, " soft small"));
    }
    for (const [name, given] of Object.entries(row.answers)) {
      const box = element("div", "answer");
      box.append(element("h3", "", name));
      for (const kind of modes()) {
        const answer = given[kind];
        if (!answer || answer.text === null) continue;
        const head = element("span", "role", kind);
        if (isNumber(answer.reward)) head.append(element("b", "", number(answer.reward)));
        box.append(head, answer.text ? said(answer.text) : said("(nothing)", " empty"));
      }
      answers.append(box);
    }
    inside.append(prompt, answers);
    return inside;
  }

  let waiting;
  filter.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(arrange, 120);
  });
  for (const control of [order, judged, mode]) control.addEventListener("change", arrange);
  if (which) which.addEventListener("change", start);
  more.addEventListener("click", draw);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      filter.focus();
    }
  });
  if ("IntersectionObserver" in window) {
    new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && !more.hidden && draw()).observe(more);
  }
  byId("tools").hidden = false;
  start();
})();
