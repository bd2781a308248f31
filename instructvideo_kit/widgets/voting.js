// Two clips in step and three answers. Each pair has a number; an answer carries it, and Python drops answers to a pair that is gone.
// A clip is one picture with its frames below each other, so that both clips change in the same instant.

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
const PATIENCE = 60000; // ms; the first look of the judges at the clips may take a while
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "same" };

function render({ model, el }) {
  const listeners = [];
  const on = (name, callback) => { model.on(`change:${name}`, callback); listeners.push([`change:${name}`, callback]); };
  let waiting = false, frame = 0, patience = null, strips = [], playing = true;

  function send(kind, side) {
    if (waiting) return;
    wait(true);
    model.send({ kind, side, number: model.get("pair").number });
    patience = setTimeout(() => { wait(false); tell("No answer from Python: it is busy with another cell, or it was restarted. Then run this cell again."); }, PATIENCE);
  }
  function wait(now) {
    waiting = now;
    clearTimeout(patience);
    root.classList.toggle("ivk-waiting", now);
  }
  function tell(text) { notice.textContent = text; notice.hidden = !text; }

  const question = make("p", { class: "ivk-question" }), captions = make("div", { class: "ivk-captions" });
  const screens = ["left", "right"].map((side) => make("canvas", { "data-side": side }));
  const clips = make("div", { class: "ivk-clips" }, ...screens.map((screen) =>
    make("button", { type: "button", class: "ivk-clip", "aria-label": `the ${screen.dataset.side} clip is better`, onclick: () => send("vote", screen.dataset.side) }, screen)));
  const answer = (side, text) => make("button", { type: "button", class: "ivk-button", "data-side": side, onclick: () => send("vote", side) }, text);
  const answers = make("div", { class: "ivk-answers" }, answer("left", "\u2190 left"), answer("same", "\u2193 the same"), answer("right", "right \u2192"));
  const undo = make("button", { type: "button", class: "ivk-button", onclick: () => send("undo") }, "Undo");
  const more = make("button", { type: "button", class: "ivk-button", onclick: () => send("more") }, "20 more");
  const bar = make("progress", { max: 1, value: 0 }), count = make("span", { class: "ivk-count" }), note = make("span", { class: "ivk-note" });
  const notice = make("p", { class: "ivk-notice", role: "alert", hidden: true });
  const keys = make("p", { class: "ivk-keys" }, make("kbd", {}, "\u2190"), " ", make("kbd", {}, "\u2192"), " vote, ", make("kbd", {}, "\u2193"), " the same, ", make("kbd", {}, "u"), " undo, ",
    make("kbd", {}, "space"), " stop and go on");
  const root = make("div", { class: "ivk ivk-voting", tabindex: "0", "data-lm-suppress-shortcuts": "true" }, question, captions, clips, answers,
    make("div", { class: "ivk-foot" }, bar, count, undo, more, note), notice, keys);

  root.addEventListener("keydown", (event) => {
    const key = event.key;
    if (key === "Tab" || key === "Escape" || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation(); // the notebook has keys of its own
    const button = event.target.closest("button");
    if (key === "Enter" || (key === " " && button)) return; // a button that has the focus is pressed
    if (KEYS[key] || key === " " || key === "Backspace") event.preventDefault();
    if (event.repeat) return;
    if (KEYS[key]) { if (strips.length) send("vote", KEYS[key]); }
    else if (key === "u" || key === "U" || key === "Backspace") send("undo");
    else if (key === " ") playing = !playing;
  });
  root.addEventListener("click", () => { if (!root.contains(document.activeElement)) root.focus({ preventScroll: true }); });

  function draw() {
    const n = model.get("pair").frames;
    strips.forEach((strip, i) => {
      const screen = screens[i], height = strip.naturalHeight / n;
      if (!strip.complete || !height) return;
      if (screen.width !== strip.naturalWidth || screen.height !== height) { screen.width = strip.naturalWidth; screen.height = height; }
      screen.classList.toggle("ivk-smooth", screen.width > 160);
      screen.getContext("2d").drawImage(strip, 0, frame * height, screen.width, height, 0, 0, screen.width, height);
      screen.dataset.frame = frame; // for whoever looks at the page from outside
    });
  }
  const ready = () => strips.length === 2 && strips.every((strip) => strip.complete && strip.naturalHeight);
  const ticking = setInterval(() => {
    if (!el.isConnected || !ready() || !playing) return;
    frame = (frame + 1) % Math.max(1, model.get("pair").frames);
    draw();
  }, 1000 / model.get("fps"));

  function refresh() {
    const pair = model.get("pair");
    wait(false);
    frame = 0;
    strips = pair.clips.map((url) => { const image = new Image(); image.onload = () => { if (ready()) draw(); }; image.src = url; return image; });
    clips.hidden = answers.hidden = keys.hidden = !pair.clips.length;
    question.textContent = pair.question;
    const words = [...new Set(pair.captions)];
    captions.classList.toggle("ivk-one", words.length < 2);
    captions.replaceChildren(...(words.length < 2 ? words : pair.captions).map((word) => make("span", {}, word)));
    bar.value = pair.of ? pair.done / pair.of : 0;
    count.textContent = `${pair.done} of ${pair.of}`;
    undo.disabled = pair.done === 0;
    more.hidden = !pair.more || pair.clips.length > 0;
    note.textContent = pair.note || "";
    root.dataset.done = pair.done;
    root.dataset.number = pair.number;
  }
  on("pair", refresh);
  on("notice", () => tell(model.get("notice")));
  el.append(root);
  refresh();
  tell(model.get("notice"));
  setTimeout(() => { if (root.isConnected && (!document.activeElement || document.activeElement === document.body)) root.focus({ preventScroll: true }); }, 200);
  return () => { clearInterval(ticking); clearTimeout(patience); for (const [name, callback] of listeners) model.off(name, callback); };
}

export default { render };
