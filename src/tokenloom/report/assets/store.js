// The responses' numbers. A quantity is inflated when it is first asked for, then kept.

const UNKNOWN = 255;

const store = {
  rows: [],
  index: null,
  mask: null,
  opened: null,
  held: new Map(),
  waiting: new Map(),

  open() { return (this.opened ??= this.read()); },

  async read() {
    let offset = 0;
    this.rows = DATA.tokens.rows.map((row, number) => {
      const made = { ...row, number, offset };
      offset += row.length;
      return made;
    });
    if (!this.rows.length) return;
    const words = await this.bytes('index');
    this.index = new Uint32Array(words.buffer, words.byteOffset, words.byteLength / 4);
    this.mask = await this.bytes('mask');
  },

  async bytes(name) {
    const node = document.querySelector(`script[data-blob="${CSS.escape(name)}"]`);
    const bytes = await inflate(fromBase64(node.textContent));
    // Once inflated the packed form is of no use any more.
    node.remove();
    return bytes;
  },

  has(variant, quantity) { return DATA.tokens.variants[variant]?.quantities.includes(quantity) ?? false; },

  // An algorithm that says nothing of a quantity (an entropy is no algorithm's) shares that of the run.
  owner(variant, quantity) { return this.has(variant, quantity) ? variant : 0; },

  load(variant, quantity) {
    const name = `${this.owner(variant, quantity)}/${quantity}`;
    if (!this.waiting.has(name)) this.waiting.set(name, this.inflated(name));
    return this.waiting.get(name);
  },

  async inflated(name) {
    const bytes = await this.bytes(name);
    const count = this.rows.length;
    this.held.set(name, {
      steps: new Float32Array(bytes.slice(0, 4 * count).buffer),
      zeros: bytes.subarray(4 * count, 5 * count),
      codes: bytes.subarray(5 * count),
    });
  },

  // The value of a token, null where there is none; undefined while the quantity is still packed.
  value(variant, quantity, row, t) {
    const found = this.held.get(`${this.owner(variant, quantity)}/${quantity}`);
    if (!found) return undefined;
    const code = found.codes[row.offset + t];
    return code === UNKNOWN ? null : (code - found.zeros[row.number]) * found.steps[row.number];
  },

  sampled(row, t) { return this.mask[row.offset + t] === 1; },
  piece(row, t) { return DATA.tokens.pieces[this.index[row.offset + t]][1]; },
  id(row, t) { return DATA.tokens.pieces[this.index[row.offset + t]][0]; },
};
