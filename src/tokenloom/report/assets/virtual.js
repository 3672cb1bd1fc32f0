// A list of items of different heights, of which only those near the visible part are in the document.

class VirtualList {
  constructor(box, draw, estimate) {
    Object.assign(this, { box, draw, estimate, items: [], heights: new Float64Array(0), tops: new Float64Array(1) });
    this.nodes = new Map();
    this.space = el('div', { class: 'virtual-space' });
    this.pending = false;
    box.replaceChildren(this.space);
    box.addEventListener('scroll', () => {
      if (this.pending) return;
      this.pending = true;
      requestAnimationFrame(() => { this.pending = false; this.render(); });
    }, { passive: true });
    this.width = 0;
    new ResizeObserver(() => {
      if (box.clientWidth === this.width) return;
      this.set(this.items, this.first());
    }).observe(box);
  }

  // Show other items, or the same ones anew; `at` is the item to have on top.
  set(items, at = 0) {
    this.items = items;
    this.width = this.box.clientWidth;
    this.heights = Float64Array.from(items, (item) => this.estimate(item, this.width));
    for (const node of this.nodes.values()) node.remove();
    this.nodes.clear();
    this.layout();
    // Twice, because the way there is known only once the items around it were measured.
    for (let pass = 0; pass < 2; pass++) {
      this.box.scrollTop = this.tops[Math.min(at, Math.max(0, items.length - 1))] ?? 0;
      this.render();
    }
  }

  layout() {
    this.tops = new Float64Array(this.items.length + 1);
    for (let i = 0; i < this.items.length; i++) this.tops[i + 1] = this.tops[i] + this.heights[i];
    this.space.style.height = `${this.tops[this.items.length]}px`;
  }

  // The item at the top of the visible part.
  first(y = this.box.scrollTop) {
    let [low, high] = [0, this.items.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.tops[middle + 1] <= y) low = middle + 1; else high = middle;
    }
    return Math.min(low, Math.max(0, this.items.length - 1));
  }

  render() {
    const reach = this.box.clientHeight / 2;
    // Heights become known only when drawn, which may bring others into view: settled after a pass or two.
    for (let pass = 0; pass < 4; pass++) {
      const [from, to] = [this.first(Math.max(0, this.box.scrollTop - reach)), this.first(this.box.scrollTop + this.box.clientHeight + reach)];
      for (const [i, node] of this.nodes) {
        if (i < from || i > to) { node.remove(); this.nodes.delete(i); }
      }
      const fresh = [];
      for (let i = from; i <= to && i < this.items.length; i++) {
        if (this.nodes.has(i)) continue;
        const node = this.draw(this.items[i], i);
        node.classList.add('item');
        this.nodes.set(i, node);
        fresh.push(i);
      }
      this.space.append(...fresh.map((i) => this.nodes.get(i)));
      const anchor = this.first();
      const within = this.box.scrollTop - this.tops[anchor];
      let changed = false;
      for (const i of fresh) {
        const height = this.nodes.get(i).offsetHeight;
        if (Math.abs(height - this.heights[i]) > 0.5) { this.heights[i] = height; changed = true; }
      }
      if (changed) {
        this.layout();
        // What is being read stays where it is while heights above it become known.
        const top = this.tops[anchor] + within;
        if (Math.abs(top - this.box.scrollTop) > 1) this.box.scrollTop = top;
      }
      for (const [i, node] of this.nodes) node.style.top = `${this.tops[i]}px`;
      if (!changed) break;
    }
  }

  // Bring an item into view and give its node.
  reveal(i) {
    const { scrollTop, clientHeight } = this.box;
    const out = this.tops[i] < scrollTop || this.tops[i + 1] > scrollTop + clientHeight;
    if (out || !this.nodes.has(i)) {
      this.box.scrollTop = this.tops[i];
      this.render();
      this.box.scrollTop = this.tops[i];
    }
    return this.nodes.get(i);
  }
}
