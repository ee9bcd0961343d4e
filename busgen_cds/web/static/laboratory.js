// The laboratory: a box drawn by mouse or numbers, images shown as they come. A module: its names are its own.

const wish = document.getElementById("wish");
const place = document.getElementById("place");
const frame = document.getElementById("frame");
const breast = document.getElementById("breast");
const sides = Object.fromEntries([...document.querySelectorAll("[data-side]")].map((each) => [each.dataset.side, each]));
const CLICKED = { wide: 30, high: 24 }; // percent: the box of a mere click

// -- the box

function keepBox() {
  const values = ["left", "top", "right", "bottom"].map((side) => sides[side].value);
  const whole = values.every((value) => value !== "");
  wish.elements.box.value = values.some((value) => value !== "") ? values.join(",") : ""; // half a box is refused
  frame.hidden = !whole;
  if (!whole) return;
  const [left, top, right, bottom] = values.map(Number);
  frame.style.left = `${left}%`;
  frame.style.top = `${top}%`;
  frame.style.width = `${Math.max(0, right - left)}%`;
  frame.style.height = `${Math.max(0, bottom - top)}%`;
}

function setBox(left, top, right, bottom) {
  const within = (value) => Math.round(Math.min(100, Math.max(0, value)));
  [sides.left.value, sides.top.value, sides.right.value, sides.bottom.value] = [left, top, right, bottom].map(within);
  keepBox();
}

function noBox() {
  for (const side of Object.values(sides)) side.value = "";
  keepBox();
}

function where(event) {
  const area = place.getBoundingClientRect();
  return [(100 * (event.clientX - area.left)) / area.width, (100 * (event.clientY - area.top)) / area.height];
}

let from = null;
place.addEventListener("pointerdown", (event) => {
  from = where(event);
  place.setPointerCapture(event.pointerId);
  event.preventDefault();
});
place.addEventListener("pointermove", (event) => {
  if (from) drag(where(event));
});
place.addEventListener("pointerup", (event) => {
  if (!from) return;
  const [x, y] = where(event);
  const small = Math.abs(x - from[0]) < 3 && Math.abs(y - from[1]) < 3;
  if (small) setBox(x - CLICKED.wide / 2, y - CLICKED.high / 2, x + CLICKED.wide / 2, y + CLICKED.high / 2);
  else drag([x, y]);
  from = null;
});

function drag([x, y]) {
  setBox(Math.min(x, from[0]), Math.min(y, from[1]), Math.max(x, from[0]), Math.max(y, from[1]));
}

for (const side of Object.values(sides)) side.addEventListener("input", keepBox);
document.getElementById("no-box").addEventListener("click", noBox);

wish.addEventListener("change", (event) => {
  if (event.target.name !== "healthy") return;
  breast.hidden = !event.target.value;
  if (event.target.value) breast.src = `/laboratory/healthy/${event.target.value}.png`;
  if (event.target.value && wish.elements.pathology.value === "normal") wish.elements.pathology.value = "malignant";
});

// -- the images

const bar = document.getElementById("bar");
const state = document.getElementById("state");
const pictures = document.getElementById("pictures");
const take = document.getElementById("take");
const outlines = document.getElementById("outlines");
const make = document.getElementById("make");
let news = null;

wish.addEventListener("submit", async (event) => {
  event.preventDefault();
  make.disabled = true;
  const answer = await fetch(wish.action, { method: "POST", body: new URLSearchParams(new FormData(wish)), headers: { "HX-Request": "true" } });
  if (!answer.ok) {
    make.disabled = false;
    tell(await answer.text(), true);
    return;
  }
  watch((await answer.json()).ref);
});

function watch(ref) {
  document.getElementById("empty-run").hidden = true;
  pictures.replaceChildren();
  take.hidden = true;
  bar.hidden = false;
  bar.value = 0;
  news = new EventSource(`/laboratory/runs/${ref}/events`);
  news.addEventListener("state", (event) => show(ref, JSON.parse(event.data)));
}

function show(ref, now) {
  const done = now.pictures.length + now.dropped;
  const part = now.steps ? now.step / now.steps : 0;
  bar.value = now.over ? 1 : Math.min(1, (done + part) / now.count);
  state.textContent = words(now, done);
  for (let n = pictures.childElementCount + 1; n <= now.pictures.length; n++) pictures.append(picture(ref, n, now.pictures[n - 1]));
  document.getElementById("outlines-row").hidden = !now.pictures.length;
  if (!now.over) return;
  news.close();
  bar.hidden = true;
  make.disabled = false;
  take.hidden = !now.pictures.length;
  take.href = `/laboratory/runs/${ref}.zip`;
}

function words(now, done) {
  if (now.problem) return now.problem;
  const dropped = now.dropped ? `; ${now.dropped} dropped, too near to an image it was trained on` : "";
  return now.over ? `${now.pictures.length} made${dropped}.` : `${done} of ${now.count} made${dropped} …`;
}

function picture(ref, number, facts) {
  const box = document.createElement("figure");
  const image = document.createElement("img");
  image.src = `/laboratory/runs/${ref}/images/${number}.png`;
  image.alt = `Synthetic image ${number}: ${facts.pathology}`;
  const mask = document.createElement("img");
  mask.src = `/laboratory/runs/${ref}/masks/${number}.png`;
  mask.alt = "";
  mask.className = "mask";
  const caption = document.createElement("figcaption");
  const without = facts.pathology !== "normal" && !facts.lesion && "no lesion came: have it made again, or draw a larger box";
  caption.textContent = [`${number}`, facts.pathology, facts.birads && `category ${facts.birads}`, facts.device, without].filter(Boolean).join(" · ");
  box.append(image, mask, caption);
  return box;
}

outlines.addEventListener("change", () => pictures.classList.toggle("bare", !outlines.checked));
addEventListener("pagehide", () => news && news.close());
