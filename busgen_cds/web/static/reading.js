// The reading page: frames by wheel, window and zoom, overlays, and a reader's word by key.
//
// Coordinates are those of the source frame, pixel centres at whole numbers. One transform takes them to the screen;
// it also evens out pixels that are not square.
"use strict";

(() => {
  const view = document.getElementById("view");
  let data = JSON.parse(document.getElementById("data").textContent);
  if (!view) {
    installWords();
    return;
  }

  const canvas = document.getElementById("canvas");
  const overlay = document.getElementById("overlay");
  const slider = document.getElementById("frame");
  const SVG = "http://www.w3.org/2000/svg";
  const FULL = { level: 127.5, width: 255 };
  const AHEAD = 6; // frames fetched before they are asked for
  const KEPT = 400; // frames kept decoded

  const at = { slide: 0, frame: 1, zoom: 1, x: 0, y: 0, window: { ...FULL }, finding: 0 };
  const shown = { contour: true, heat: false, mask: false };
  const pictures = new Map(); // "uid/frame" → Promise of ImageBitmap
  const veils = new Map(); // finding → ImageBitmap, or null while it is on its way
  const blank = new Set(); // findings whose evidence nowhere reaches the threshold of drawing
  let edit = null; // { number, points, dragged }
  let playing = 0;
  let painted = null; // what the canvas of the frame itself holds
  const own = document.createElement("canvas"); // the frame, windowed, in its own pixels

  // -- pictures

  function slide() {
    return data.slides[at.slide];
  }

  function picture(uid, frame) {
    const name = `${uid}/${frame}`;
    if (!pictures.has(name)) {
      const asked = fetch(`/studies/${data.study}/frames/${name}`).then(async (answer) => {
        if (!answer.ok) throw new Error(await answer.text());
        return createImageBitmap(await answer.blob());
      });
      asked.catch(() => pictures.delete(name));
      pictures.set(name, asked);
      while (pictures.size > KEPT) pictures.delete(pictures.keys().next().value);
    }
    return pictures.get(name);
  }

  function isBlank(picture) {
    const paper = document.createElement("canvas");
    paper.width = picture.width;
    paper.height = picture.height;
    const pen = paper.getContext("2d");
    pen.drawImage(picture, 0, 0);
    const { data: values } = pen.getImageData(0, 0, paper.width, paper.height);
    for (let i = 3; i < values.length; i += 4) if (values[i]) return false;
    return true;
  }

  function veil(number) {
    const region = number ? data.findings[number - 1].heat : data.keyHeat;
    if (!region) return null;
    if (!veils.has(number)) {
      veils.set(number, null);
      fetch(`/studies/${data.study}/evidence/${data.revision}/${number}`)
        .then(async (answer) => {
          if (!answer.ok) throw new Error(await answer.text());
          const ready = await createImageBitmap(await answer.blob());
          if (isBlank(ready)) blank.add(number);
          veils.set(number, ready);
          draw();
        })
        .catch((failed) => tell(failed.message || "The evidence map cannot be shown.", true));
    }
    return { region, picture: veils.get(number), blank: blank.has(number) };
  }

  function here() {
    return data.findings.filter((each) => each.uid === slide().uid && each.frame === at.frame);
  }

  // -- from the frame to the screen

  function transform() {
    const s = slide();
    const stretch = s.spacing ? s.spacing[0] / s.spacing[1] : 1;
    const fit = Math.min(view.clientWidth / s.columns, view.clientHeight / (s.rows * stretch));
    const kx = fit * at.zoom;
    const ky = kx * stretch;
    const x = (view.clientWidth - s.columns * kx) / 2 + at.x;
    const y = (view.clientHeight - s.rows * ky) / 2 + at.y;
    return { kx, ky, x, y };
  }

  function toFrame(event) {
    const box = view.getBoundingClientRect();
    const t = transform();
    return [(event.clientX - box.left - t.x) / t.kx - 0.5, (event.clientY - box.top - t.y) / t.ky - 0.5];
  }

  // -- drawing

  let due = false;
  function draw() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      paint();
    });
  }

  async function paint() {
    const wanted = `${slide().uid}/${at.frame}`;
    const busy = setTimeout(() => (document.getElementById("busy").hidden = false), 250);
    try {
      const bitmap = await picture(slide().uid, at.frame);
      if (wanted !== `${slide().uid}/${at.frame}`) return;
      windowed(bitmap, wanted);
    } catch (failed) {
      tell(failed.message || "This frame cannot be shown.", true);
      return;
    } finally {
      clearTimeout(busy);
      document.getElementById("busy").hidden = true;
    }
    const ratio = devicePixelRatio || 1;
    const [wide, high] = [Math.round(view.clientWidth * ratio), Math.round(view.clientHeight * ratio)];
    if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
    const pen = canvas.getContext("2d");
    const t = transform();
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, wide, high);
    pen.setTransform(t.kx * ratio, 0, 0, t.ky * ratio, t.x * ratio, t.y * ratio);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(own, 0, 0);
    paintVeil(pen);
    outline(t);
    words(t);
    ahead();
    view.dataset.shown = wanted;
  }

  function windowed(bitmap, name) {
    const key = `${name} ${at.window.level} ${at.window.width}`;
    if (painted === key) return;
    painted = key;
    [own.width, own.height] = [bitmap.width, bitmap.height];
    const pen = own.getContext("2d", { willReadFrequently: true });
    pen.drawImage(bitmap, 0, 0);
    const { level, width } = at.window;
    if (level === FULL.level && width === FULL.width) return;
    const table = Uint8ClampedArray.from({ length: 256 }, (_, i) => ((i - level) / width + 0.5) * 255);
    const image = pen.getImageData(0, 0, own.width, own.height);
    for (let i = 0; i < image.data.length; i += 4) {
      image.data[i] = table[image.data[i]];
      image.data[i + 1] = table[image.data[i + 1]];
      image.data[i + 2] = table[image.data[i + 2]];
    }
    pen.putImageData(image, 0, 0);
  }

  function paintVeil(pen) {
    const caption = document.getElementById("caption");
    const numbers = here().map((each) => each.number);
    if (!numbers.length && data.key && data.key.uid === slide().uid && data.key.frame === at.frame) numbers.push(0);
    const maps = shown.heat ? numbers.map(veil).filter(Boolean) : [];
    caption.hidden = !shown.heat;
    caption.textContent = !maps.length
      ? "No evidence map for this frame"
      : maps.every((map) => map.blank)
        ? "No evidence above the threshold of drawing in this frame"
        : "Evidence for the score, not the extent of a lesion · warm: malignant, cold: benign";
    view.dataset.veiled = String(maps.some((map) => map.picture));
    for (const { region, picture: ready } of maps) {
      const [left, top, right, bottom] = region;
      if (ready) pen.drawImage(ready, left, top, right - left, bottom - top);
    }
  }

  function element(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  }

  function screen(points, t) {
    return points.map(([x, y]) => [t.x + (x + 0.5) * t.kx, t.y + (y + 0.5) * t.ky]);
  }

  function outline(t) {
    overlay.replaceChildren();
    for (const each of here()) {
      const changing = edit && edit.number === each.number;
      const points = screen(changing ? edit.points : each.edited.length ? each.edited : each.contour, t);
      const text = points.map((point) => point.map((v) => v.toFixed(1)).join(",")).join(" ");
      const kind = `${each.number === at.finding ? "chosen" : ""} ${each.rejected ? "rejected" : ""} ${changing ? "editing" : ""}`;
      if (shown.mask) element("polygon", { points: text, class: `mask ${kind}` }, overlay);
      if (shown.contour || changing) {
        element("polygon", { points: text, class: `rim ${kind}` }, overlay);
        element("polygon", { points: text, class: `line ${kind}` }, overlay);
      }
      if (changing) for (const [x, y] of spread(points)) element("circle", { cx: x, cy: y, r: 4, class: "handle" }, overlay);
      if (shown.contour || shown.mask || changing) label(each.number, points, kind);
    }
  }

  function spread(points) {
    const step = Math.max(1, Math.floor(points.length / 12));
    return points.filter((_, i) => i % step === 0);
  }

  function label(number, points, kind) {
    const [x, y] = points.reduce((a, b) => (b[0] - b[1] > a[0] - a[1] ? b : a));
    element("circle", { cx: x + 14, cy: y - 12, r: 9, class: `badge ${kind}` }, overlay);
    element("text", { x: x + 14, y: y - 8, class: "badge" }, overlay).textContent = number;
  }

  function words(t) {
    const s = slide();
    const images = data.slides.length > 1 ? `Image ${at.slide + 1} of ${data.slides.length}` : "";
    const frames = s.frames > 1 ? `Frame ${at.frame} of ${s.frames}` : "";
    document.getElementById("where").textContent = [images, frames].filter(Boolean).join(" · ");
    const w = at.window;
    const plain = w.level === FULL.level && w.width === FULL.width;
    document.getElementById("how").textContent = `${Math.round(at.zoom * 100)} %${plain ? "" : ` · window ${Math.round(w.level)} / ${Math.round(w.width)}`}`;
    document.getElementById("count").textContent = `${at.frame} / ${s.frames}`;
    slider.max = s.frames;
    slider.value = at.frame;
    slider.disabled = s.frames < 2;
    document.getElementById("play").disabled = s.frames < 2;
    ruler(s, t);
    for (const button of document.querySelectorAll("#strip button")) {
      const current = Number(button.dataset.slide) === at.slide;
      if (current && !button.hasAttribute("aria-current")) button.scrollIntoView({ block: "nearest", inline: "nearest" });
      button.toggleAttribute("aria-current", current);
    }
    for (const card of document.querySelectorAll("[data-finding]")) {
      card.classList.toggle("chosen", Number(card.dataset.finding) === at.finding && at.finding > 0);
    }
  }

  function ruler(s, t) {
    const place = document.getElementById("scale");
    place.replaceChildren();
    if (!s.spacing) {
      place.textContent = "no scale";
      return;
    }
    const pixels = t.kx / s.spacing[1];
    const length = [50, 20, 10, 5, 2, 1].find((mm) => mm * pixels < view.clientWidth / 4) || 1;
    const bar = document.createElementNS(SVG, "svg");
    bar.setAttribute("width", length * pixels + 2);
    bar.setAttribute("height", 10);
    element("path", { d: `M1 1v8M1 5h${length * pixels}M${length * pixels + 1} 1v8` }, bar);
    place.append(bar, ` ${length} mm`);
  }

  function ahead() {
    const s = slide();
    for (let i = 1; i <= (playing ? 2 * AHEAD : AHEAD) && i < s.frames; i++) {
      picture(s.uid, ((at.frame - 1 + i) % s.frames) + 1).catch(() => {});
    }
  }

  // -- moving

  function go(slideNumber, frame) {
    if (edit) leave();
    at.slide = Math.min(data.slides.length - 1, Math.max(0, slideNumber));
    at.frame = Math.min(slide().frames, Math.max(1, frame));
    draw();
  }

  function step(by) {
    const next = at.frame + by;
    if (next >= 1 && next <= slide().frames) go(at.slide, next);
    else if (next < 1 && at.slide > 0) go(at.slide - 1, data.slides[at.slide - 1].frames);
    else if (next > slide().frames && at.slide < data.slides.length - 1) go(at.slide + 1, 1);
  }

  function toFinding(number) {
    const finding = data.findings[number - 1];
    if (!finding) return;
    const index = data.slides.findIndex((each) => each.uid === finding.uid);
    if (index < 0) {
      tell("The image of this finding cannot be shown.", true);
      return;
    }
    if (edit && edit.number !== number) leave();
    at.finding = number;
    if (at.slide !== index || at.frame !== finding.frame) go(index, finding.frame);
    else draw();
  }

  function play() {
    if (playing) clearTimeout(playing);
    const button = document.getElementById("play");
    if (playing || slide().frames < 2) {
      playing = 0;
    } else {
      const beat = () => {
        go(at.slide, (at.frame % slide().frames) + 1);
        playing = setTimeout(beat, slide().seconds * 1000);
      };
      playing = setTimeout(beat, 0);
    }
    button.setAttribute("aria-pressed", String(Boolean(playing)));
    button.textContent = playing ? "❚❚" : "▶";
  }

  function zoom(by, event) {
    const before = event ? toFrame(event) : null;
    at.zoom = Math.min(12, Math.max(0.5, at.zoom * by));
    if (before) {
      const after = toFrame(event);
      const t = transform();
      at.x += (after[0] - before[0]) * t.kx;
      at.y += (after[1] - before[1]) * t.ky;
    }
    draw();
  }

  function reset() {
    Object.assign(at, { zoom: 1, x: 0, y: 0, window: { ...FULL } });
    draw();
  }

  function rewindow(level, width) {
    at.window.level = Math.min(255, Math.max(0, at.window.level + level));
    at.window.width = Math.min(512, Math.max(8, at.window.width + width));
    draw();
  }

  function move(x, y) {
    at.x += x;
    at.y += y;
    draw();
  }

  function toggle(name) {
    if (document.querySelector(`[data-act="${name}"]`).disabled) return;
    shown[name] = !shown[name];
    document.querySelector(`[data-act="${name}"]`).setAttribute("aria-pressed", String(shown[name]));
    draw();
  }

  // -- editing a contour: a drag takes the neighbours along, less the farther they are

  function startEdit(number) {
    const finding = data.findings[number - 1];
    const form = document.getElementById(`editor-${number}`);
    if (!finding || !form) return;
    toFinding(number);
    if (playing) play();
    const from = finding.edited.length ? finding.edited : finding.contour;
    edit = { number, points: dense(from), dragged: false, grabbed: null };
    form.hidden = false;
    form.querySelector("select").focus();
    view.classList.add("editing");
    draw();
  }

  // Enough points that a drag bends a line instead of a corner.
  function dense(points) {
    const closed = same(points[0], points[points.length - 1]) ? points.slice(0, -1) : points;
    const around = closed.reduce((sum, p, i) => sum + apart(p, closed[(i + 1) % closed.length]), 0);
    const longest = Math.max(around / 72, 1e-3);
    return closed.flatMap((p, i) => {
      const next = closed[(i + 1) % closed.length];
      const parts = Math.max(1, Math.round(apart(p, next) / longest));
      return Array.from({ length: parts }, (_, k) => [p[0] + ((next[0] - p[0]) * k) / parts, p[1] + ((next[1] - p[1]) * k) / parts]);
    });
  }

  function same(a, b) {
    return a[0] === b[0] && a[1] === b[1];
  }

  function apart(a, b) {
    return Math.hypot(a[0] - b[0], a[1] - b[1]);
  }

  function nearest(place) {
    const off = edit.points.map((point) => apart(point, place));
    const index = off.indexOf(Math.min(...off));
    return off[index] * transform().kx < 24 ? index : null;
  }

  function drag(place) {
    const [dx, dy] = [place[0] - edit.from[0], place[1] - edit.from[1]];
    const n = edit.points.length;
    const reach = n / 14;
    edit.points = edit.start.map(([x, y], i) => {
      const away = Math.min((i - edit.grabbed + n) % n, (edit.grabbed - i + n) % n);
      const part = Math.exp(-((away / reach) ** 2) / 2);
      return inside([x + dx * part, y + dy * part]);
    });
    edit.dragged = true;
    draw();
  }

  function inside([x, y]) {
    const s = slide();
    return [Math.min(s.columns - 0.5, Math.max(-0.5, x)), Math.min(s.rows - 0.5, Math.max(-0.5, y))];
  }

  function grow(by) {
    const n = edit.points.length;
    const middle = edit.points.reduce((sum, p) => [sum[0] + p[0] / n, sum[1] + p[1] / n], [0, 0]);
    edit.points = edit.points.map(([x, y]) => inside([middle[0] + (x - middle[0]) * by, middle[1] + (y - middle[1]) * by]));
    edit.dragged = true;
    draw();
  }

  function leave() {
    if (!edit) return;
    const form = document.getElementById(`editor-${edit.number}`);
    if (form) form.hidden = true;
    edit = null;
    view.classList.remove("editing");
    document.querySelector(`[data-edit="${at.finding}"]`)?.focus();
    draw();
  }

  document.addEventListener("htmx:configRequest", (event) => {
    if (!edit || event.target.id !== `editor-${edit.number}`) return;
    const points = edit.dragged ? edit.points.map((p) => p.map((v) => Math.round(v * 100) / 100)) : [];
    event.detail.parameters.contour = points.length ? JSON.stringify(points) : "";
    if (!points.length && !event.detail.parameters.birads) {
      event.preventDefault();
      tell("Nothing was changed: drag the contour or choose a category, or press Esc.", true);
    }
  });

  // -- mouse

  let hand = null;
  view.addEventListener("contextmenu", (event) => event.preventDefault());
  view.addEventListener("pointerdown", (event) => {
    view.setPointerCapture(event.pointerId);
    const place = toFrame(event);
    const grabbed = edit && event.button === 0 ? nearest(place) : null;
    if (grabbed !== null) {
      Object.assign(edit, { grabbed, start: edit.points, from: place });
      hand = { kind: "edit" };
    } else {
      hand = { kind: event.button === 2 ? "window" : "move", x: event.clientX, y: event.clientY };
    }
    view.classList.add("held");
  });
  view.addEventListener("pointermove", (event) => {
    if (!hand) return;
    if (hand.kind === "edit") {
      drag(toFrame(event));
      return;
    }
    const [dx, dy] = [event.clientX - hand.x, event.clientY - hand.y];
    [hand.x, hand.y] = [event.clientX, event.clientY];
    if (hand.kind === "move") move(dx, dy);
    else rewindow(dy / 2, dx);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    view.addEventListener(end, () => {
      hand = null;
      view.classList.remove("held");
    });
  }
  let turned = 0;
  view.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (event.ctrlKey) {
        zoom(Math.exp(-event.deltaY / 400), event);
        return;
      }
      turned += event.deltaY;
      if (Math.abs(turned) < 24) return;
      step(turned > 0 ? 1 : -1);
      turned = 0;
    },
    { passive: false },
  );
  slider.addEventListener("input", () => go(at.slide, Number(slider.value)));
  new ResizeObserver(draw).observe(view);

  document.addEventListener("click", (event) => {
    const goto = event.target.closest("[data-goto]");
    const strip = event.target.closest("[data-slide]");
    const act = event.target.closest("[data-act]");
    if (goto) toFinding(Number(goto.dataset.goto));
    if (strip) go(Number(strip.dataset.slide), 1);
    if (act && controls[act.dataset.act]) controls[act.dataset.act]();
  });

  const controls = {
    play,
    reset,
    contour: () => toggle("contour"),
    heat: () => toggle("heat"),
    mask: () => toggle("mask"),
    "zoom-in": () => zoom(1.25),
    "zoom-out": () => zoom(0.8),
  };

  // -- keys

  const imageKeys = {
    ArrowDown: () => step(1),
    ArrowUp: () => step(-1),
    ArrowRight: () => go(at.slide + 1, 1),
    ArrowLeft: () => go(at.slide - 1, 1),
    " ": play,
    c: controls.contour,
    h: controls.heat,
    m: controls.mask,
    "+": controls["zoom-in"],
    "=": controls["zoom-in"],
    "-": controls["zoom-out"],
    0: reset,
    b: () => rewindow(-10, 0),
    d: () => rewindow(10, 0),
    k: () => rewindow(0, -20),
    l: () => rewindow(0, 20),
    "Shift ArrowUp": () => move(0, -40),
    "Shift ArrowDown": () => move(0, 40),
    "Shift ArrowLeft": () => move(-40, 0),
    "Shift ArrowRight": () => move(40, 0),
    f: () => toFinding((at.finding % Math.max(1, data.findings.length)) + 1),
    o: () => document.querySelector(".controls a.button")?.click(),
  };

  installWords(startEdit, leave, () => edit, grow, imageKeys, () => at.finding, (fresh) => {
    data = fresh;
    edit = null;
    offered();
    view.classList.remove("editing");
    draw();
  });

  // What this answer cannot show is not offered.
  function offered() {
    const drawn = data.findings.length > 0;
    const maps = data.findings.some((each) => each.heat) || Boolean(data.keyHeat);
    for (const [name, there] of [["contour", drawn], ["mask", drawn], ["heat", maps]]) {
      document.querySelector(`[data-act="${name}"]`).disabled = !there;
    }
  }

  offered();
  const first = data.findings[0];
  const start = first || data.key;
  const index = start ? data.slides.findIndex((each) => each.uid === start.uid) : -1;
  if (first && index >= 0) at.finding = 1;
  go(Math.max(0, index), index >= 0 ? start.frame : 1);

  // -- words, with or without an image

  function installWords(edits, leaves, editing, grows, keys = {}, chosen = () => 0, renewed = () => {}) {
    const open = () => document.querySelector(".reasons:not([hidden])");

    function reasons(number) {
      const list = document.getElementById(`reasons-${number}`);
      const was = open();
      if (was) close(was);
      if (!list || was === list) return;
      list.hidden = false;
      document.querySelector(`[data-reject="${number}"]`).setAttribute("aria-expanded", "true");
      list.querySelector("button").focus();
    }

    function close(list) {
      list.hidden = true;
      const button = document.querySelector(`[aria-controls="${list.id}"]`);
      button.setAttribute("aria-expanded", "false");
      if (list.contains(document.activeElement)) button.focus();
    }

    function inCard(selector) {
      const card = document.activeElement.closest("[data-finding]") || document.querySelector(`[data-finding="${chosen()}"]`) || document.querySelector("[data-finding]");
      return card && card.querySelector(selector);
    }

    document.addEventListener("click", (event) => {
      const reject = event.target.closest("[data-reject]");
      const start = event.target.closest("[data-edit]");
      if (reject) reasons(Number(reject.dataset.reject));
      if (start && edits) edits(Number(start.dataset.edit));
      if (event.target.closest("[data-leave]") && leaves) leaves();
    });

    const wordKeys = {
      a: () => inCard('[data-word="agree"]')?.click(),
      e: () => inCard("[data-edit]")?.click(),
      r: () => inCard("[data-reject]")?.click(),
      n: () => document.getElementById("next")?.click(),
      u: () => document.getElementById("back").click(),
    };

    document.addEventListener("keydown", (event) => {
      if (help.open) return;
      const list = open();
      const now = editing && editing();
      if (event.key === "Escape" && (list || now)) {
        if (list) close(list);
        else leaves();
        return;
      }
      if (list && /^[1-9]$/.test(event.key)) {
        list.querySelectorAll("button")[Number(event.key) - 1]?.click();
        return;
      }
      if (now && (event.key === "[" || event.key === "]") && !event.target.matches("[name=note]")) {
        event.preventDefault();
        grows(event.key === "[" ? 0.97 : 1.03);
        return;
      }
      if (now && event.key === "Enter" && !event.target.matches("button")) {
        event.preventDefault();
        document.getElementById(`editor-${now.number}`).requestSubmit();
        return;
      }
      if (typing(event) || (event.target.matches("button, a, summary, input") && (event.key === " " || event.key === "Enter"))) return;
      const arrow = event.shiftKey && event.key.startsWith("Arrow") ? "Shift " : "";
      const act = wordKeys[event.key] || keys[arrow + event.key];
      if (!act || now) return;
      event.preventDefault();
      act();
    });

    document.body.addEventListener("htmx:afterSettle", (event) => {
      if (event.detail.target.id !== "panel" && event.detail.elt.id !== "panel") return;
      renewed(JSON.parse(document.getElementById("data").textContent));
      const done = document.querySelector("#panel .word");
      if (done) tell("Kept.");
      (document.querySelector(`[data-words="${chosen()}"] button`) || document.getElementById("next"))?.focus();
    });
  }
})();
