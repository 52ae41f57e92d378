// The page: a drawing in one or two layers, and for each network what it makes of it.

const MOST_UNDO = 40; // strokes
const OFFSETS = Array.from({ length: 11 }, (_, n) => (n - 5) / 20); // −0.25 to 0.25
const POSES = [
  // name, label, least, most, step, where it does nothing
  ["rotation", "Turn", -180, 180, 1, 0],
  ["shear", "Slant", -45, 45, 1, 0],
  ["scale", "Scale", 0.5, 1.5, 0.05, 1],
  ["right", "Right", -12, 12, 0.5, 0],
  ["down", "Down", -12, 12, 0.5, 0],
];

const find = (selector, within = document) => within.querySelector(selector);
const create = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const read = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

const number = (value) => value.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "−");

function write(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 8192)
    text += String.fromCharCode(...bytes.subarray(start, start + 8192));
  return btoa(text);
}

function tell(message) {
  find("#status").textContent = message;
}

let failing = ""; // the path whose request failed last, while its message is shown

function fail(error) {
  failing = error.path ?? "";
  tell(error.message);
}

let awaited = 0; // answers, images being opened, and delays before something is asked

function wait(more) {
  awaited += more;
  document.body.setAttribute("aria-busy", String(awaited > 0));
}

async function ask(path, content) {
  wait(1);
  try {
    return await send(path, content);
  } finally {
    wait(-1);
  }
}

async function send(path, content) {
  const options = content && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(content),
  };
  const whose = `${path} ${content?.network}`;
  const refuse = (message) => Object.assign(new Error(message), { path: whose });
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw refuse("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw refuse(answer.error ?? `The server answered ${response.status}.`);
  if (failing === whose) {
    tell("");
    failing = "";
  }
  return answer;
}

// Runs the newest of the calls that came while it was running, and drops the others.
function newest(work) {
  let running = false, again = false;
  return async function call() {
    if (running) return void (again = true);
    running = true;
    do {
      again = false;
      await work().catch(fail);
    } while (again);
    running = false;
  };
}

// ---- pictures ----------------------------------------------------------------------------------

// Shows the bytes of an image [height, width, channels] pixel by pixel.
function show(canvas, bytes, { height, width, channels }) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++)
    for (let c = 0; c < 4; c++)
      image.data[4 * pixel + c] = c === 3 ? 255 : bytes[pixel * channels + (channels === 3 ? c : 0)];
  context.putImageData(image, 0, 0);
}

// The mean of some channels of a pixel, of which each takes `stride` bytes.
function mean(bytes, pixel, channels, stride = channels) {
  let sum = 0;
  for (let c = 0; c < channels; c++) sum += bytes[pixel * stride + c];
  return sum / channels;
}

// Shows two images over each other, the first in orange and the second in blue, adding up to white.
function overlay(canvas, first, second, { height, width, channels }) {
  const rgb = new Uint8ClampedArray(3 * width * height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const a = mean(first, pixel, channels), b = mean(second, pixel, channels);
    rgb.set([a, 0.55 * a + 0.45 * b, b], 3 * pixel);
  }
  show(canvas, rgb, { height, width, channels: 3 });
}

// Shows shares [rows][columns]: grey where all are equal, orange below that, blue above.
function showMap(canvas, rows, equal, farthest) {
  const values = rows.flat(), bytes = new Uint8ClampedArray(3 * values.length);
  values.forEach((value, n) => {
    const far = Math.min(1, Math.abs(value - equal) / farthest);
    const end = value < equal ? [240, 130, 0] : [30, 150, 255];
    bytes.set(end.map((part) => 95 + far * (part - 95)), 3 * n);
  });
  show(canvas, bytes, { height: rows.length, width: rows[0].length, channels: 3 });
}

// Draws the scores [angles][classes] over the angles, the three classes of highest peaks in colour.
function showCurves(canvas, angles, scores) {
  const ratio = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = box.width || 400, height = box.height || 170;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const left = 30, right = width - 44, top = 8, bottom = height - 22;
  const x = (angle) => left + ((angle - angles[0]) / (angles.at(-1) - angles[0])) * (right - left);
  const y = (score) => bottom - score * (bottom - top);
  context.font = "12px system-ui, sans-serif";
  context.strokeStyle = style("--line");
  context.fillStyle = style("--quiet");
  for (const score of [0, 0.5, 1]) {
    context.beginPath();
    context.moveTo(left, y(score));
    context.lineTo(right, y(score));
    context.stroke();
    context.fillText(score, 6, y(score) + 4);
  }
  context.textAlign = "center";
  for (const angle of [-90, -45, 0, 45, 90])
    context.fillText(String(angle).replace("-", "−"), x(angle), height - 6);
  context.textAlign = "left";
  const peaks = scores[0].map((_, n) => Math.max(...scores.map((row) => row[n])));
  const first = peaks.map((_, n) => n).sort((a, b) => peaks[b] - peaks[a]).slice(0, 3);
  const colours = [style("--first"), style("--second"), style("--third")];
  peaks.forEach((_, n) => {
    const rank = first.indexOf(n);
    context.strokeStyle = rank < 0 ? style("--line") : colours[rank];
    context.lineWidth = rank < 0 ? 1 : 2;
    context.beginPath();
    scores.forEach((row, k) => context.lineTo(x(angles[k]), y(row[n])));
    context.stroke();
  });
  const ends = first.map((n, rank) => ({ n, at: y(scores.at(-1)[n]) + 4, colour: colours[rank] }));
  ends.sort((a, b) => b.at - a.at); // from below, each at least a line above the one before
  ends.forEach((end, k) => (end.at = Math.min(end.at, k ? ends[k - 1].at - 14 : bottom + 4)));
  for (const { n, at, colour } of ends) {
    context.fillStyle = colour;
    context.fillText(n, right + 6, at);
  }
}

// ---- the drawing -------------------------------------------------------------------------------

class Pad {
  constructor(network, changed) {
    this.changed = changed;
    this.colourful = network.channels === 3;
    this.unit = Math.max(1, Math.floor(400 / Math.max(network.height, network.width)));
    this.width = network.width * this.unit;
    this.height = network.height * this.unit;
    this.canvas = find("#pad");
    Object.assign(this.canvas, { width: this.width, height: this.height });
    this.layers = [0, 1].map(() => create("canvas", { width: this.width, height: this.height }));
    this.contexts = this.layers.map((layer) => layer.getContext("2d", { willReadFrequently: true }));
    this.inked = [false, false]; // which layers were drawn on
    this.undone = [];
    this.point = null; // where the pen is while it is down
    this.pointer = null; // which finger, pen or mouse holds it
    this.cursor = null; // where the arrow keys have led it
    this.frame = null; // the next repaint, if one is due
    this.exported = null; // the layers for the server, until they change
    this.listen();
    this.paint();
  }

  get active() {
    return Number(find("input[name=layer]:checked").value);
  }

  listen() {
    const { canvas } = this;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) * (this.width / box.width),
        (event.clientY - box.top) * (this.height / box.height)];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 0 || this.pointer !== null) return; // a second finger draws nothing
      this.pointer = event.pointerId;
      canvas.setPointerCapture(event.pointerId);
      this.begin(place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.pointer) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const part of events.length ? events : [event]) this.line(place(part));
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (event) => {
        if (event.pointerId === this.pointer) this.point = this.pointer = null;
      });
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("blur", () => {
      this.point = this.pointer = this.cursor = null;
      this.repaint();
    });
  }

  // Arrow keys move the pen, the space bar lowers and lifts it.
  press(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.cursor ??= [this.width / 2, this.height / 2];
    if (event.key === " ") {
      if (this.point) this.point = null;
      else this.begin(this.cursor);
      this.repaint();
    } else if (event.key in steps) {
      const far = event.shiftKey ? this.unit / 2 : this.unit;
      const [x, y] = steps[event.key];
      this.cursor = [Math.min(this.width, Math.max(0, this.cursor[0] + far * x)),
        Math.min(this.height, Math.max(0, this.cursor[1] + far * y))];
      if (this.point) this.line(this.cursor);
      else this.repaint();
    } else return;
    event.preventDefault();
  }

  begin(point) {
    this.keep();
    this.point = point;
    this.line(point);
  }

  line(point) {
    const context = this.contexts[this.active];
    const erases = find("input[name=tool]:checked").value === "eraser";
    context.globalCompositeOperation = erases ? "destination-out" : "source-over";
    context.strokeStyle = this.colourful ? find("#colour").value : "#fff";
    context.lineWidth = (erases ? 1.8 : 1) * Number(find("#width").value) * (this.width / 280);
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.point);
    context.lineTo(...point);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.point = point;
    this.inked[this.active] ||= !erases;
    this.update();
  }

  // Keeps what there is, to be undone.
  keep() {
    tell("");
    const images = this.contexts.map((c) => c.getImageData(0, 0, this.width, this.height));
    this.undone.push({ images, inked: [...this.inked] });
    if (this.undone.length > MOST_UNDO) this.undone.shift();
  }

  undo() {
    const last = this.undone.pop();
    if (!last) return tell("There is nothing to undo.");
    last.images.forEach((image, n) => this.contexts[n].putImageData(image, 0, 0));
    this.inked = last.inked;
    this.update();
  }

  clear() {
    this.keep();
    for (const context of this.contexts) context.clearRect(0, 0, this.width, this.height);
    this.inked = [false, false];
    this.update();
  }

  // Replaces the active layer by an image, as large as it fits.
  put(image, { smooth, unit }) {
    this.keep();
    const context = this.contexts[this.active];
    const scale = unit ?? Math.min(this.width / image.width, this.height / image.height);
    const [width, height] = [image.width * scale, image.height * scale];
    context.clearRect(0, 0, this.width, this.height);
    context.imageSmoothingEnabled = smooth;
    context.drawImage(image, (this.width - width) / 2, (this.height - height) / 2, width, height);
    this.inked[this.active] = true;
    this.update();
  }

  // Makes dark ink on light paper light on dark: only then are black margins right around it.
  invertPaper() {
    const context = this.contexts[this.active];
    const image = context.getImageData(0, 0, this.width, this.height), { data } = image;
    const border = [];
    for (let pixel = 0; pixel < this.width * this.height; pixel++) {
      const column = pixel % this.width, row = Math.floor(pixel / this.width);
      const outer = Math.min(column, row, this.width - 1 - column, this.height - 1 - row) < 3;
      if (outer && data[4 * pixel + 3]) border.push(mean(data, pixel, 3, 4));
    }
    border.sort((a, b) => a - b);
    if (!(border[Math.floor(border.length / 2)] > 127)) return false;
    for (let n = 0; n < data.length; n++)
      if (n % 4 < 3 && data[n - (n % 4) + 3]) data[n] = 255 - data[n];
    context.putImageData(image, 0, 0);
    this.update();
    return true;
  }

  // Paints once before the next picture on the screen, however many points were drawn.
  repaint() {
    this.frame ??= requestAnimationFrame(() => this.paint());
  }

  // Shows the layers, in colours if both hold ink.
  paint() {
    this.frame = null;
    const context = this.canvas.getContext("2d"), both = this.inked[0] && this.inked[1];
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "lighter";
    this.layers.forEach((layer, n) => context.drawImage(both ? this.tint(layer, n) : layer, 0, 0));
    context.globalCompositeOperation = "source-over";
    if (!this.cursor) return;
    context.strokeStyle = this.point ? "#f0a24a" : "#56b4e9";
    context.lineWidth = 2;
    context.beginPath();
    context.arc(...this.cursor, 8, 0, 2 * Math.PI);
    context.stroke();
  }

  tint(layer, n) {
    const copy = create("canvas", { width: this.width, height: this.height });
    const context = copy.getContext("2d");
    context.drawImage(layer, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = ["rgb(255, 140, 0)", "rgb(0, 115, 255)"][n];
    context.fillRect(0, 0, this.width, this.height);
    return copy;
  }

  update() {
    this.exported = null;
    this.repaint();
    this.changed();
  }

  // Returns the layers that hold ink, or an empty one, for the server.
  export() {
    const used = this.contexts.filter((_, n) => this.inked[n]);
    this.exported ??= (used.length ? used : [this.contexts[0]]).map((c) => this.encode(c));
    const { width, height, exported: layers } = this;
    return { layers, width, height, channels: this.colourful ? 3 : 1 };
  }

  // Returns the bytes of a layer in base64, light on dark.
  encode(context) {
    const channels = this.colourful ? 3 : 1;
    const { data } = context.getImageData(0, 0, this.width, this.height);
    const bytes = new Uint8Array(channels * this.width * this.height);
    for (let pixel = 0; pixel < this.width * this.height; pixel++) {
      const at = 4 * pixel, alpha = data[at + 3] / 255;
      if (!alpha) continue;
      if (channels === 1) bytes[pixel] = Math.round(alpha * mean(data, pixel, 3, 4));
      else for (let c = 0; c < 3; c++) bytes[3 * pixel + c] = Math.round(alpha * data[at + c]);
    }
    return write(bytes);
  }
}

// ---- a network ---------------------------------------------------------------------------------

class NetworkView {
  constructor(network, index, drawing) {
    Object.assign(this, { network, index, drawing, chosen: null, stage: network.iterations });
    this.root = find("#network").content.firstElementChild.cloneNode(true);
    find("#networks").append(this.root);
    find(".name", this.root).textContent = network.name;
    const { height, width, channels, kind, classes, iterations } = network;
    find(".facts", this.root).textContent =
      `${kind}: images of ${height}×${width}×${channels}, ${classes} classes, ` +
      (iterations > 1 ? `trained with ${iterations} iterations of routing` : "no iterations");
    this.read = newest(() => this.ask());
    this.turn = newest(() => this.askCurve());
    this.draw = newest(() => this.askDrawing());
    this.build();
  }

  all(selector) {
    return this.root.querySelectorAll(selector);
  }

  build() {
    const { network, root } = this;
    this.bars = Array.from({ length: network.classes }, (_, n) => {
      const bar = create("button", { className: "bar", type: "button" });
      bar.append(create("span", { textContent: n }), create("span", { className: "track" }),
        create("span", { className: "value" }));
      find(".track", bar).append(create("span", { className: "length" }));
      bar.addEventListener("click", () => this.choose(n));
      find(".bars", root).append(bar);
      return bar;
    });
    find(".follow", root).addEventListener("click", () => this.choose(null));
    for (const part of this.all(".decoded")) part.hidden = !network.draws;
    find(".coupled", root).hidden = !network.grid;
    this.maps = Array.from({ length: network.stages }, (_, n) => {
      const figure = create("figure"), caption = create("figcaption", { textContent: `after ${n + 1}` });
      figure.append(create("canvas"), caption);
      find("canvas", figure).setAttribute("role", "img");
      find(".maps", root).append(figure);
      return figure;
    });
    const slider = find(".stage", root);
    Object.assign(slider, { max: network.stages, value: this.stage });
    slider.addEventListener("input", () => {
      this.stage = Number(slider.value);
      this.render();
    });
    find(".stages", root).hidden = network.stages === 1;
    if (network.draws) this.buildNumbers();
  }

  buildNumbers() {
    this.sliders = Array.from({ length: this.network.dim }, (_, n) => {
      const row = create("div", { className: "slider" });
      const name = create("button", { type: "button", textContent: n + 1 });
      name.setAttribute("aria-label", `Show number ${n + 1} from −0.25 to +0.25`);
      const slider = create("input", { type: "range", min: -1, max: 1, step: 0.01 });
      slider.setAttribute("aria-label", `Number ${n + 1} of the capsule`);
      row.append(name, slider, create("output"));
      name.addEventListener("click", () => this.showLine(n).catch(fail));
      slider.addEventListener("input", () => {
        this.capsule[n] = Number(slider.value);
        find("output", row).textContent = number(this.capsule[n]);
        this.draw();
      });
      find(".numbers", this.root).append(row);
      return slider;
    });
    find(".reset", this.root).addEventListener("click", () => this.render());
  }

  choose(chosen) {
    this.chosen = chosen;
    this.read();
  }

  request() {
    return { network: this.index, chosen: this.chosen, ...this.drawing() };
  }

  async ask() {
    const request = this.request();
    this.answer = await ask("/read", request);
    this.answer.both = request.layers.length > 1;
    this.render();
    if (this.index === 0)
      show(find("#seen"), read(this.answer.image), this.network);
    if (this.later) clearTimeout(this.later);
    else wait(1);
    this.later = setTimeout(() => this.rest(), 150);
  }

  // Asks for the curve once the pen rests.
  rest() {
    this.later = null;
    this.turn();
    wait(-1);
    if (this.index === 0) find("#answer").textContent = `Read as ${this.highest}.`;
  }

  async askCurve() {
    const { scores } = await ask("/curve", this.request());
    this.curve = scores;
    const canvas = find(".curve", this.root);
    showCurves(canvas, this.network.angles, scores);
    const at = scores.map((row) => row.indexOf(Math.max(...row)));
    canvas.setAttribute("aria-label", "Class of the highest score at each angle: " +
      this.network.angles.map((angle, n) => `${angle}°: ${at[n]}`).join(", "));
  }

  async askDrawing() {
    const { capsule, index: network, shown: chosen } = this;
    const { drawings } = await ask("/draw", { network, chosen, capsules: [capsule] });
    if (capsule !== this.capsule) return; // another was read meanwhile
    show(find(".drawn", this.root), read(drawings[0]), this.network);
  }

  // Shows the drawings as one number moves, all others as they are.
  async showLine(n) {
    const { capsule, index: network, shown: chosen } = this;
    const capsules = OFFSETS.map((offset) => capsule.map((value, k) => value + (k === n) * offset));
    const { drawings } = await ask("/draw", { network, chosen, capsules });
    if (capsule !== this.capsule) return;
    find(".line", this.root).hidden = false;
    find(".line-hint", this.root).textContent =
      `Number ${n + 1} of the capsule of ${chosen}, moved by −0.25 to +0.25:`;
    find(".frames", this.root).replaceChildren(...drawings.map((drawing, k) => {
      const figure = create("figure"), canvas = create("canvas");
      const offset = `${OFFSETS[k] > 0 ? "+" : ""}${number(OFFSETS[k])}`;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Drawing with number ${n + 1} moved by ${offset}`);
      show(canvas, read(drawing), this.network);
      figure.append(canvas, create("figcaption", { textContent: offset }));
      return figure;
    }));
  }

  // Shows the answer after as many iterations as are chosen.
  render() {
    if (!this.answer) return;
    const { answer, network, root } = this, n = Math.min(this.stage, network.stages) - 1;
    this.shown = answer.shown[n];
    this.highest = answer.scores[n].indexOf(Math.max(...answer.scores[n]));
    this.bars.forEach((bar, k) => {
      const score = answer.scores[n][k];
      find(".length", bar).style.width = `${100 * Math.min(1, score)}%`;
      find(".value", bar).textContent = score.toFixed(2);
      bar.setAttribute("aria-pressed", String(k === this.shown));
      bar.setAttribute("aria-label", `Class ${k}: ${score.toFixed(2)}`);
    });
    find(".follow", root).disabled = this.chosen === null;
    find(".stage", root).value = n + 1;
    find(".stages output", root).textContent = n + 1;
    if (answer.couplings) this.renderMaps(n);
    if (network.draws) this.renderCapsule(n);
  }

  renderMaps(current) {
    const { couplings } = this.answer, [rows, columns] = this.network.grid;
    const equal = 1 / this.network.classes, every = couplings.flat(2);
    const farthest = Math.max(equal / 5, ...every.map((value) => Math.abs(value - equal)));
    const placed = columns > 1; // otherwise a column of capsules that have no positions
    const side = Math.ceil(Math.sqrt(rows)); // of the square in which these are shown
    const arrange = (all) => Array.from({ length: Math.ceil(rows / side) }, (_, row) =>
      Array.from({ length: side }, (_, k) => all[row * side + k] ?? equal));
    this.maps.forEach((figure, n) => {
      const canvas = find("canvas", figure), all = couplings[n].flat();
      showMap(canvas, placed ? couplings[n] : arrange(all), equal, farthest);
      canvas.setAttribute("aria-label", `Couplings to class ${this.shown} after iteration ` +
        `${n + 1}, from ${number(Math.min(...all))} to ${number(Math.max(...all))}`);
      figure.classList.toggle("current", n === current);
    });
    find(".maps-hint", this.root).textContent =
      `How much of the primary capsules${placed ? ` at each of ${rows}×${columns} positions` : ""} ` +
      `goes to class ${this.shown}: grey ${number(equal)}, as much as to any other; orange less, ` +
      `blue more (${number(Math.min(...every))} to ${number(Math.max(...every))}).`;
  }

  renderCapsule(n) {
    const { answer, network, root } = this;
    this.capsule = [...answer.capsules[n]];
    find(".line", root).hidden = true;
    show(find(".drawn", root), read(answer.drawings[n]), network);
    find(".drawn-hint", root).textContent = `From the ${network.dim} numbers of the capsule of ${this.shown}.`;
    find(".drawn", root).setAttribute("aria-label", `What the capsule of ${this.shown} draws`);
    this.sliders.forEach((slider, k) => {
      slider.value = this.capsule[k];
      slider.nextElementSibling.textContent = number(this.capsule[k]);
    });
    find(".apart", root).hidden = !answer.both;
    if (!answer.both) return;
    const [first, second] = answer.pair.classes;
    overlay(find(".pair", root), ...answer.pair.drawings.map(read), network);
    find(".apart-hint", root).textContent =
      `The two longest capsules: ${first} in orange, ${second} in blue.`;
    find(".pair", root).setAttribute("aria-label", `${first} in orange and ${second} in blue`);
  }
}

// ---- saving ------------------------------------------------------------------------------------

// Paints what is seen into one picture.
function compose(pad, views) {
  const wide = 760, tall = 40 + 330 * views.length;
  const picture = create("canvas", { width: 300 + wide, height: Math.max(tall, 480) });
  const context = picture.getContext("2d");
  context.fillStyle = style("--back");
  context.fillRect(0, 0, picture.width, picture.height);
  const text = (words, x, y, bold) => {
    context.font = `${bold ? "600 " : ""}14px system-ui, sans-serif`;
    context.fillStyle = style("--text");
    context.fillText(words, x, y);
  };
  const paste = (canvas, x, y, width) => {
    context.imageSmoothingEnabled = false;
    if (canvas.width && canvas.height)
      context.drawImage(canvas, x, y, width, (width * canvas.height) / canvas.width);
  };
  text("Drawing", 20, 30, true);
  paste(pad.canvas, 20, 42, 250);
  text("What the network gets", 20, 325, true);
  paste(find("#seen"), 20, 337, 112);
  views.forEach((view, n) => {
    const top = 30 + 330 * n;
    text(view.network.name, 300, top, true);
    view.bars.forEach((bar, k) => {
      if (k > 11) return;
      text(k, 300, top + 32 + 22 * k);
      context.fillStyle = style("--bar");
      const score = Number(find(".value", bar).textContent);
      context.fillRect(320, top + 21 + 22 * k, 150 * score, 13);
      text(score.toFixed(2), 478, top + 32 + 22 * k);
    });
    if (view.network.draws) {
      text(`The capsule of ${view.shown} draws`, 540, top);
      paste(find(".drawn", view.root), 540, top + 12, 112);
      if (!find(".apart", view.root).hidden) paste(find(".pair", view.root), 665, top + 12, 112);
    }
    if (view.answer?.couplings) {
      text("Couplings after each iteration", 540, top + 148);
      view.maps.forEach((figure, k) => paste(find("canvas", figure), 540 + 66 * k, top + 158, 60));
    }
    if (view.curve) {
      const curve = create("canvas");
      curve.getBoundingClientRect = () => ({ width: 330, height: 90 });
      showCurves(curve, view.network.angles, view.curve);
      context.drawImage(curve, 540, top + 232, 330, 90);
    }
  });
  return picture;
}

async function save(pad, views) {
  const blob = await new Promise((resolve) => compose(pad, views).toBlob(resolve, "image/png"));
  const link = create("a", { href: URL.createObjectURL(blob), download: "capsules.png" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- the whole ---------------------------------------------------------------------------------

function buildPose(changed) {
  const pose = Object.fromEntries(POSES.map(([name, , , , , neutral]) => [name, neutral]));
  const rows = POSES.map(([name, label, min, max, step, neutral]) => {
    const row = create("label", { className: "slider", textContent: label });
    const slider = create("input", { type: "range", id: name, min, max, step, value: neutral });
    const output = create("output");
    const set = (value) => {
      slider.value = value;
      pose[name] = Number(slider.value);
      output.textContent = String(pose[name]).replace("-", "−");
    };
    slider.addEventListener("input", () => {
      set(slider.value);
      changed();
    });
    row.append(slider, output);
    find("#pose").append(row);
    set(neutral);
    return () => set(neutral);
  });
  find("#straight").addEventListener("click", () => {
    for (const straighten of rows) straighten();
    changed();
  });
  return pose;
}

async function takeDigit(pad, number) {
  const { pixels, label, number: found } = await ask(`/digit/${number}`);
  const image = create("canvas");
  show(image, read(pixels), { height: 28, width: 28, channels: 1 });
  const exact = Math.min(pad.width, pad.height) >= 28 * pad.unit;
  pad.put(image, { smooth: !exact, unit: exact ? pad.unit : undefined });
  find("#number").value = found;
  find("#label").textContent = `shows ${label}`;
}

async function openImage(pad, file) {
  wait(1);
  try {
    const image = await createImageBitmap(file).catch(() => null);
    if (!image) return tell(`${file.name} is no image that this browser can show.`);
    pad.put(image, { smooth: true });
    if (!pad.colourful && pad.invertPaper())
      tell("The paper was light, so the image was inverted: the network reads light on dark.");
  } finally {
    wait(-1);
  }
}

async function main() {
  const networks = await ask("/networks");
  const changed = () => views.forEach((view) => view.read());
  const pad = new Pad(networks[0], changed), pose = buildPose(changed);
  const centred = find("#centred");
  const drawing = () => ({ ...pad.export(), centred: centred.checked, pose });
  const views = networks.map((network, index) => new NetworkView(network, index, drawing));
  const { channels, classes } = networks[0];
  find("#digits").hidden = channels !== 1 || classes !== 10;
  find("#colour-label").hidden = channels !== 3;
  centred.checked = channels === 1 && classes === 10;
  centred.addEventListener("change", changed);
  find("#undo").addEventListener("click", () => pad.undo());
  find("#clear").addEventListener("click", () => pad.clear());
  find("#take").addEventListener("click", () => takeDigit(pad, Number(find("#number").value) || 0).catch(fail));
  find("#random").addEventListener("click", () =>
    takeDigit(pad, Math.floor(10000 * Math.random())).catch(fail));
  find("#file").addEventListener("change", async (event) => {
    if (event.target.files[0]) await openImage(pad, event.target.files[0]);
    event.target.value = ""; // the same file may be opened again
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) openImage(pad, event.dataTransfer.files[0]);
  });
  const width = find("#width"), tellWidth = () => (width.nextElementSibling.textContent = width.value);
  width.addEventListener("input", tellWidth);
  tellWidth();
  find("#save").addEventListener("click", () => save(pad, views).catch(fail));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  changed();
}

main().catch(fail);
