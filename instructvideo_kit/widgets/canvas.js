// The page of the canvas. It draws what Python's EditSession holds (steps, and a place among them) and sends every finished stroke,
// arrow and setting back as JSON. It paints no pixels for Python: the picture is made there, from the same steps, when a video is asked for.

const COLOURS = { red: "#e5484d", orange: "#f76b15", yellow: "#ffd23f", green: "#46a758", blue: "#0090ff", violet: "#8e4ec6", brown: "#8b5a2b", white: "#ffffff", black: "#1c2024" };
const VEIL = "#7c4df0";
const ICONS = {
  brush: '<path d="M13.5 13.5 20 4"/><path d="M4 20c4.5.8 9.6-.3 9.6-4.2a2.9 2.9 0 0 0-5.8 0C7.8 18 6.5 19.5 4 20z"/>',
  mask: '<circle cx="12" cy="12" r="8" stroke-dasharray="3.5 2.7"/><circle cx="12" cy="12" r="2.5" fill="currentColor" stroke="none"/>',
  arrow: '<circle cx="6" cy="18" r="2"/><path d="M7.5 16.5 19 5M11 5h8v8"/>',
  eraser: '<path d="M9 20h11M4.5 14.5 14 5l5.5 5.5L10 20H8z M9.5 9.5l5.5 5.5"/>',
  undo: '<path d="M9 6 4 11l5 5M4 11h10a5 5 0 0 1 0 10h-2"/>',
  redo: '<path d="m15 6 5 5-5 5M20 11H10a5 5 0 0 0 0 10h2"/>',
  clear: '<path d="M4 7h16M9.5 7V4h5v3M6.5 7l1 13h9l1-13"/>',
  play: '<path d="M8 5v14l11-7z" fill="currentColor"/>',
  pause: '<path d="M8 5v14M16 5v14" stroke-width="3.5"/>',
};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}
function icon(name) {
  const holder = make("span", { class: "ivk-icon", "aria-hidden": "true" });
  holder.innerHTML = `<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round">${ICONS[name]}</svg>`;
  return holder;
}
const svg = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const cent = (value) => Math.round(value * 100) / 100;
const lambda = (value) => `\u03bb = ${Number(value)}`;

const HINTS = {
  brush: "Press and paint. The keys [ and ] change the size.", mask: "Violet: only there may the video follow your edit. No violet: everywhere.", arrow: "Draw from a thing to where it shall go; the ring is what moves along.",
  eraser: "Rub out paint; the picture below comes back.", maskEraser: "Rub out the violet of the mask.",
};

// What shows at this place among the steps: the same fold as in EditSession.
function marksOf(session) {
  const done = session.steps.slice(0, session.at);
  return done.slice(done.map((step) => step.kind).lastIndexOf("clear") + 1);
}
function dragsOf(session) {
  const drags = [];
  for (const step of marksOf(session)) {
    if (step.kind === "drag") drags.push(step);
    else if (step.kind === "delete_drag") drags.splice(step.index, 1);
  }
  return drags;
}
// What Python will make of a message, so that the page need not wait for it.
function foretell(session, message) {
  if (message.kind === "undo") return { ...session, at: Math.max(0, session.at - 1) };
  if (message.kind === "redo") return { ...session, at: Math.min(session.steps.length, session.at + 1) };
  if (message.kind === "clear" && !marksOf(session).length) return session;
  if (!["stroke", "erase", "mask_stroke", "drag", "delete_drag", "clear"].includes(message.kind)) return session;
  const steps = [...session.steps.slice(0, session.at), message];
  return { ...session, steps, at: steps.length };
}
function trace(context, step, colour) {
  const [first, ...rest] = step.points;
  Object.assign(context, { lineCap: "round", lineJoin: "round", lineWidth: step.size, strokeStyle: colour });
  context.globalAlpha = step.kind === "stroke" ? step.opacity : 1;
  context.globalCompositeOperation = step.kind === "erase" ? "destination-out" : "source-over";
  context.beginPath();
  context.moveTo(...first);
  for (const point of rest.length ? rest : [first]) context.lineTo(...point);
  context.stroke();
}
function drawLayer(canvas, marks, layer) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-over";
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const step of marks) {
    const own = step.kind === (layer === "paint" ? "stroke" : "mask_stroke") || (step.kind === "erase" && step.layer === layer);
    if (own) trace(context, step, layer === "paint" ? step.colour ?? "#000" : VEIL);
  }
}

function render({ model, el }) {
  const view = Math.random().toString(36).slice(2), listeners = [];
  let session = model.get("session"), sent = 0, patience = null;
  const width = session.width, height = session.height, unit = Math.max(1, Math.max(width, height) / 32), finest = Math.max(1, unit / 8);
  const tool = { name: "brush", erasing: false, colour: COLOURS.red, opacity: 1, sizes: { brush: 4 * unit, mask: 8 * unit, arrow: 6 * unit } };
  let live = null, cursor = null, frame = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  // --- words with Python
  function send(message) {
    sent += 1;
    session = foretell(session, message);
    model.send({ ...message, echo: [view, sent] });
    clearTimeout(patience);
    patience = setTimeout(() => tell("No answer from Python: it is busy with another cell, or it was restarted. Then run this cell again."), 8000);
    refresh();
  }
  function on(name, callback) { model.on(`change:${name}`, callback); listeners.push([`change:${name}`, callback]); }

  // --- tools
  const button = (label, name, title, onclick, more = {}) =>
    make("button", { type: "button", class: "ivk-button", title, "aria-label": more.text ? null : label, onclick, ...more.attributes }, name ? icon(name) : null, more.text ? label : null);
  const tools = Object.fromEntries([["brush", "Brush", "Paint on the picture (B)"], ["mask", "Mask", "Mark where the video may follow your edit (M)"], ["arrow", "Arrow", "Draw from a thing to where it shall go (A)"]]
    .map(([name, label, title]) => [name, button(label, name, title, () => choose(name), { text: true })]));
  const eraser = button("Eraser", "eraser", "Rub out paint, or the mask in mask mode (E)", () => { tool.erasing = !tool.erasing; refresh(); }, { text: true });
  const undo = button("Undo", "undo", "Undo (Ctrl+Z)", () => send({ kind: "undo" }));
  const redo = button("Redo", "redo", "Redo (Ctrl+Shift+Z)", () => send({ kind: "redo" }));
  const clear = button("Clear", "clear", "Take away strokes, mask and arrows (can be undone)", () => send({ kind: "clear" }));
  const swatches = Object.entries(COLOURS).map(([name, value]) =>
    make("button", { type: "button", class: "ivk-swatch", "aria-label": name, title: name, style: `--swatch:${value}`, onclick: () => colour(value) }));
  const ownColour = make("input", { type: "color", class: "ivk-colour", "aria-label": "another colour", title: "another colour", oninput: (event) => colour(event.target.value) });
  const slider = (label, low, high, step, oninput) => {
    const output = make("output", { class: "ivk-output" });
    const input = make("input", { type: "range", min: low, max: high, step, oninput: () => oninput(Number(input.value)) });
    const name = make("span", { class: "ivk-label" }, label);
    return { box: make("label", { class: "ivk-slider" }, name, input, output), input, output, name };
  };
  const size = slider("Size", finest, 24 * unit, finest / 2, (value) => { tool.sizes[tool.name] = value; refresh(); });
  const opacity = slider("Opacity", 0.05, 1, 0.05, (value) => { tool.opacity = value; refresh(); });
  const choose = (name) => { tool.name = name; tool.erasing = false; drop(); refresh(); };
  const colour = (value) => { tool.colour = value; if (tool.name !== "brush" || tool.erasing) choose("brush"); refresh(); };
  const toolbar = make("div", { class: "ivk-tools", role: "toolbar", "aria-label": "Drawing" },
    make("div", { class: "ivk-group", role: "group", "aria-label": "Tool" }, ...Object.values(tools), eraser),
    make("div", { class: "ivk-group ivk-swatches", role: "group", "aria-label": "Colour" }, ...swatches, ownColour),
    make("div", { class: "ivk-group ivk-sliders" }, size.box, opacity.box),
    make("div", { class: "ivk-group", role: "group", "aria-label": "History" }, undo, redo, clear));

  // --- the picture and what lies on it
  const layer = (name) => make("canvas", { class: `ivk-layer ivk-${name}`, width, height, "aria-hidden": "true" });
  const base = make("img", { class: "ivk-layer", alt: "", draggable: "false" }), paint = layer("paint"), mask = layer("mask");
  const over = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "ivk-layer ivk-over", "aria-hidden": "true" });
  const deletes = make("div", { class: "ivk-deletes" });
  const stage = make("div", { class: "ivk-stage", tabindex: "0", role: "application", "aria-roledescription": "painting area",
    "aria-label": "Your picture. Arrow keys move the brush, Shift moves it further, Space puts it down and lifts it, Escape gives up the stroke. B, M, A and E choose the tool." }, base, paint, mask, over);
  const holder = make("div", { class: "ivk-holder", style: `aspect-ratio:${width}/${height}` }, stage, deletes);
  const sharp = Math.max(width, height) <= 160;

  const at = (event) => {
    const box = stage.getBoundingClientRect();
    return [clamp(((event.clientX - box.left) / box.width) * width, -width, 2 * width), clamp(((event.clientY - box.top) / box.height) * height, -height, 2 * height)].map(cent);
  };
  const inside = ([x, y]) => [clamp(x, 0, width), clamp(y, 0, height)];
  function begin(point) {
    if (tool.name === "arrow") live = tool.erasing ? null : { kind: "drag", start: inside(point), end: inside(point), radius: tool.sizes.arrow };
    else if (tool.erasing) live = { kind: "erase", points: [point], size: tool.sizes[tool.name], layer: tool.name === "mask" ? "mask" : "paint" };
    else if (tool.name === "mask") live = { kind: "mask_stroke", points: [point], size: tool.sizes.mask };
    else live = { kind: "stroke", points: [point], colour: tool.colour, size: tool.sizes.brush, opacity: tool.opacity };
  }
  function extend(point) {
    if (!live) return;
    if (live.kind === "drag") { live.end = inside(point); return; }
    const last = live.points.at(-1), room = stage.getBoundingClientRect().width / width;
    if (Math.hypot(point[0] - last[0], point[1] - last[1]) * room >= 1.5) live.points.push(point);
  }
  function finish() {
    const step = live;
    live = null;
    if (!step) return;
    if (step.kind === "drag" && Math.hypot(step.end[0] - step.start[0], step.end[1] - step.start[1]) < unit / 2) { tell("An arrow goes from a thing to another place: press, move, let go."); refresh(); return; }
    send(step);
  }
  function drop() { live = null; }
  let pending = 0;
  const soon = () => { if (!pending) pending = requestAnimationFrame(() => { pending = 0; refreshStage(); }); };
  stage.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button > 0) return;
    event.preventDefault();
    stage.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    begin(at(event));
    cursor = at(event);
    soon();
  });
  stage.addEventListener("pointermove", (event) => {
    if (!event.isPrimary) return;
    const points = event.getCoalescedEvents?.() ?? [];
    for (const each of points.length ? points : [event]) extend(at(each));
    cursor = at(event);
    soon();
  });
  stage.addEventListener("pointerup", (event) => { if (event.isPrimary) { extend(at(event)); finish(); } });
  stage.addEventListener("pointercancel", () => { drop(); soon(); });
  stage.addEventListener("pointerleave", () => { if (!live) { cursor = null; soon(); } });
  stage.addEventListener("blur", () => { drop(); cursor = null; soon(); });
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], key = event.key.toLowerCase();
    if (move) {
      const far = (event.shiftKey ? 4 : 1) * unit;
      cursor = inside([(cursor ?? [width / 2, height / 2])[0] + far * move[0], (cursor ?? [width / 2, height / 2])[1] + far * move[1]].map(cent));
      extend(cursor);
    } else if (key === " ") { cursor ??= [width / 2, height / 2]; if (live) finish(); else begin(cursor); }
    else if (key === "escape") drop();
    else if (key === "b") choose("brush");
    else if (key === "m") choose("mask");
    else if (key === "a") choose("arrow");
    else if (key === "e") eraser.click();
    else if (key === "[" || key === "]") { tool.sizes[tool.name] = clamp(tool.sizes[tool.name] + (key === "]" ? unit : -unit), finest, 24 * unit); refresh(); }
    else if ((key === "delete" || key === "backspace") && dragsOf(session).length) send({ kind: "delete_drag", index: dragsOf(session).length - 1 });
    else return;
    event.preventDefault();
    event.stopPropagation();
    soon();
  });

  function drawArrow({ start, end, radius }, faint) {
    const [dx, dy] = [end[0] - start[0], end[1] - start[1]], long = Math.hypot(dx, dy) || 1, head = Math.min(1.9 * unit, 0.6 * long), [ux, uy] = [dx / long, dy / long];
    const neck = [end[0] - head * ux, end[1] - head * uy], wing = 0.55 * head;
    const tip = [end, [neck[0] - wing * uy, neck[1] + wing * ux], [neck[0] + wing * uy, neck[1] - wing * ux]].map((p) => p.join(",")).join(" ");
    for (const kind of ["shadow", "light"]) {
      const group = svg("g", { class: `ivk-arrow ivk-${kind}`, opacity: faint ? 0.75 : 1 });
      group.append(svg("circle", { cx: start[0], cy: start[1], r: radius }), svg("line", { x1: start[0], y1: start[1], x2: neck[0], y2: neck[1] }), svg("polygon", { points: tip }));
      over.append(group);
    }
  }
  function refreshStage() {
    const marks = live && live.points ? [...marksOf(session), live] : marksOf(session), drags = dragsOf(session);
    drawLayer(paint, marks, "paint");
    drawLayer(mask, marks, "mask");
    over.replaceChildren();
    for (const drag of drags) drawArrow(drag);
    if (live && live.kind === "drag") drawArrow(live, true);
    const shown = cursor && !(live && live.kind === "drag") && !(tool.name === "arrow" && tool.erasing);
    if (shown) for (const kind of ["shadow", "light"]) {
      const ring = svg("circle", { cx: cursor[0], cy: cursor[1], r: tool.name === "arrow" ? tool.sizes.arrow : tool.sizes[tool.name] / 2, class: `ivk-ring ivk-${kind}` });
      over.append(ring);
    }
    const wanted = tool.name === "arrow" && !live;
    const key = wanted ? JSON.stringify(drags) : "";
    if (deletes.dataset.key === key) return;
    deletes.dataset.key = key;
    deletes.replaceChildren(...(wanted ? drags : []).map((drag, index) => make("button", { type: "button", class: "ivk-delete", "aria-label": `delete arrow ${index + 1}`, title: "delete this arrow",
      style: `left:${(50 * (drag.start[0] + drag.end[0])) / width}%;top:${(50 * (drag.start[1] + drag.end[1])) / height}%`, onclick: () => { send({ kind: "delete_drag", index }); stage.focus(); } }, "\u00d7")));
  }

  // --- clips: one clock for the result and the strip
  const screens = []; // {canvas, images}
  function screen(clip) {
    const canvas = make("canvas", { class: "ivk-screen", role: "img", "aria-label": `video, ${lambda(clip.lam)}` });
    const images = clip.frames.map((url) => Object.assign(new Image(), { src: url, onload: () => showFrame() }));
    screens.push({ canvas, images });
    return canvas;
  }
  function frames() { return screens.length ? Math.max(...screens.map((each) => each.images.length)) : 0; }
  function showFrame() {
    for (const { canvas, images } of screens) {
      const image = images[frame % images.length];
      if (!image.complete || !image.naturalWidth) continue;
      if (canvas.width !== image.naturalWidth || canvas.height !== image.naturalHeight) Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
      canvas.classList.toggle("ivk-sharp", Math.max(canvas.width, canvas.height) <= 160);
      canvas.getContext("2d").drawImage(image, 0, 0);
      canvas.dataset.frame = frame % images.length;
    }
    clock.input.value = frame;
    clock.output.textContent = frames() ? `${frame + 1} / ${frames()}` : "";
  }
  const play = button("Pause", "pause", "Play or pause (all clips together)", () => { playing = !playing; refreshPlayer(); });
  const clock = slider("Frame", 0, 1, 1, (value) => { playing = false; frame = value; refreshPlayer(); });
  const result = make("div", { class: "ivk-holder ivk-empty", style: `aspect-ratio:${width}/${height}` });
  const resultCaption = make("span", {}, "Video"), player = make("div", { class: "ivk-player" }, play, clock.box);
  const strip = make("div", { class: "ivk-strip", role: "group", "aria-label": "The same noise at five values of lambda" });
  function refreshPlayer() {
    clock.input.max = Math.max(1, frames() - 1);
    player.classList.toggle("ivk-off", !frames());
    for (const control of [play, clock.input]) control.disabled = !frames();
    play.setAttribute("aria-label", playing ? "Pause" : "Play");
    play.replaceChildren(icon(playing ? "pause" : "play"));
    showFrame();
  }
  function refreshClips() {
    screens.length = 0;
    const clip = model.get("clip"), several = model.get("strip");
    result.classList.toggle("ivk-empty", !clip.frames);
    result.replaceChildren(clip.frames ? screen(clip) : make("span", {}, "Paint, drag or describe, then press Generate."));
    resultCaption.textContent = clip.frames ? `Video \u00b7 ${lambda(clip.lam)}, seed ${clip.seed}` : "Video";
    strip.replaceChildren(...several.map((each) => make("figure", {}, screen(each), make("figcaption", {}, lambda(each.lam),
      each.lam === 1 ? make("small", {}, "the original") : each.lam === 0 ? make("small", {}, "your edit") : null))));
    strip.hidden = !several.length;
    frame = frames() ? frame % frames() : 0;
    refreshPlayer();
  }
  const ticking = setInterval(() => { if (playing && frames() && el.isConnected) { frame = (frame + 1) % frames(); showFrame(); } }, 1000 / model.get("fps"));

  // --- the form
  const text = (name, label, placeholder) => {
    const input = make("input", { type: "text", maxlength: 1000, placeholder, onchange: () => send({ kind: "set", [name]: input.value }) });
    return { box: make("label", { class: "ivk-text" }, make("span", { class: "ivk-label" }, label), input), input };
  };
  const content = text("content", "Content", "what is to be seen: a fox in the meadow"), motion = text("motion", "Motion", "how it moves: the fox runs to the right");
  const lam = slider("\u03bb", 0, 1, 0.05, (value) => { lam.output.textContent = value.toFixed(2); });
  lam.input.setAttribute("aria-label", "lambda: 0 follows your edit, 1 keeps the original");
  lam.input.addEventListener("change", () => send({ kind: "set", lam: Number(lam.input.value) }));
  const ends = make("span", { class: "ivk-ends", "aria-hidden": "true" }, make("span", {}, "your edit"), make("span", {}, "the original"));
  const seed = make("input", { type: "number", min: 0, max: 2147483647, step: 1, onchange: () => send({ kind: "set", seed: seed.value === "" ? null : Number(seed.value) }) });
  const form = make("div", { class: "ivk-form" }, content.box, motion.box, make("div", { class: "ivk-lambda" }, lam.box, ends), make("label", { class: "ivk-seed" }, make("span", { class: "ivk-label" }, "Seed"), seed));

  // --- runs
  const fields = () => ({ content: content.input.value, motion: motion.input.value, lam: Number(lam.input.value), seed: Number(seed.value) });
  const generate = make("button", { type: "button", class: "ivk-button ivk-primary", onclick: () => send({ kind: "generate", ...fields() }) }, "Generate");
  const compare = make("button", { type: "button", class: "ivk-button", title: "One video each for \u03bb = 1, 0.75, 0.5, 0.25, 0: five times the work", onclick: () => send({ kind: "compare", ...fields() }) }, "Compare \u03bb");
  const stop = make("button", { type: "button", class: "ivk-button ivk-stop", title: "End the run after the step it is at", onclick: () => send({ kind: "stop" }) }, "Stop");
  const bar = make("progress", { max: 1, value: 0, "aria-label": "denoising steps" }), message = make("span", { class: "ivk-message", role: "status" });
  const notice = make("div", { class: "ivk-notice", role: "alert" });
  const actions = make("div", { class: "ivk-actions" }, generate, stop, compare, make("div", { class: "ivk-progress" }, bar, message));
  function tell(words) { notice.textContent = words; }
  function refreshStatus() {
    const status = model.get("status");
    generate.classList.toggle("ivk-busy", status.busy);
    compare.classList.toggle("ivk-busy", status.busy); // both stay live: a press during a run is answered with a sentence
    stop.disabled = !status.busy;
    bar.classList.toggle("ivk-off", !status.busy);
    if (status.steps) Object.assign(bar, { max: status.steps, value: status.step });
    else bar.removeAttribute("value");
    message.textContent = status.message;
    tell(status.notice);
  }

  // --- files
  function download() {
    const { echo, ...plain } = session, link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(plain)], { type: "application/json" })), download: "edit-session.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  const chooser = make("input", { type: "file", accept: ".json,application/json", hidden: true, onchange: async () => {
    const [file] = chooser.files;
    if (!file) return;
    try { send({ kind: "open", state: JSON.parse(await file.text()) }); } catch { tell(`"${file.name}" is damaged: it holds no JSON. Nothing was changed.`); }
    chooser.value = "";
  } });
  const files = make("div", { class: "ivk-files" }, make("button", { type: "button", class: "ivk-link", onclick: download }, "Save session as a file"),
    make("button", { type: "button", class: "ivk-link", onclick: () => chooser.click() }, "Open a session"), chooser, make("span", { class: "ivk-note" }, model.get("note")));

  // --- all together
  const hint = make("p", { class: "ivk-hint" });
  const caption = make("span", {}, `Your picture \u00b7 ${width} \u00d7 ${height}`);
  const root = make("div", { class: "ivk", "data-lm-suppress-shortcuts": "true" }, toolbar,
    make("div", { class: "ivk-pair" }, make("figure", {}, make("figcaption", {}, caption), holder, hint), make("figure", {}, make("figcaption", {}, resultCaption), result, player)), form, actions, notice, strip, files);
  root.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), typing = event.target.matches("input[type=text], input[type=number]");
    if ((event.ctrlKey || event.metaKey) && !typing && (key === "z" || key === "y")) { send({ kind: key === "y" || event.shiftKey ? "redo" : "undo" }); event.preventDefault(); }
    if (event.key !== "Escape" && event.key !== "Tab") event.stopPropagation(); // the notebook has keys of its own
  });

  function refresh() {
    for (const [name, each] of Object.entries(tools)) each.setAttribute("aria-pressed", name === tool.name);
    eraser.setAttribute("aria-pressed", tool.erasing);
    eraser.disabled = tool.name === "arrow";
    for (const swatch of swatches) swatch.setAttribute("aria-pressed", swatch.style.getPropertyValue("--swatch") === tool.colour);
    ownColour.value = tool.colour;
    size.name.textContent = tool.name === "arrow" ? "Region" : "Size";
    size.input.value = tool.sizes[tool.name];
    size.output.textContent = `${cent(tool.sizes[tool.name])} px`;
    opacity.input.value = tool.opacity;
    opacity.output.textContent = `${Math.round(tool.opacity * 100)} %`;
    opacity.box.classList.toggle("ivk-off", tool.name !== "brush" || tool.erasing);
    opacity.input.disabled = tool.name !== "brush" || tool.erasing;
    undo.disabled = session.at === 0;
    redo.disabled = session.at === session.steps.length;
    clear.disabled = !marksOf(session).length;
    hint.textContent = HINTS[!tool.erasing ? tool.name : tool.name === "mask" ? "maskEraser" : "eraser"];
    stage.dataset.tool = tool.name;
    stage.dataset.marks = marksOf(session).length; // for whoever looks at the page from outside
    refreshStage();
  }
  function refreshSession() {
    const next = model.get("session"), [from, number] = next.echo;
    if (from === view && number < sent) return; // Python has not yet read all that was sent
    clearTimeout(patience);
    session = next;
    for (const [input, value] of [[content.input, next.content], [motion.input, next.motion], [seed, next.seed], [lam.input, next.lam]]) if (document.activeElement !== input) input.value = value;
    lam.output.textContent = Number(lam.input.value).toFixed(2);
    refresh();
  }
  base.src = model.get("picture");
  root.classList.toggle("ivk-pixels", sharp);
  on("session", refreshSession);
  on("status", refreshStatus);
  on("clip", refreshClips);
  on("strip", refreshClips);
  el.append(root);
  refreshSession(); refreshStatus(); refreshClips();
  return () => { clearInterval(ticking); clearTimeout(patience); for (const [name, callback] of listeners) model.off(name, callback); };
}

export default { render };
