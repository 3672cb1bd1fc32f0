// Building the page. Text reaches the document through text nodes only: never as markup.

const DATA = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === 'function') node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function section(id, title, note, ...children) {
  return el('section', { id, 'aria-labelledby': `${id}-title` },
    el('header', { class: 'section-head' },
      el('h2', { id: `${id}-title` }, title),
      note ? el('p', { class: 'muted' }, note) : null),
    children);
}

function select(label, name, options, value, onchange) {
  const box = el('select', { name, change: () => onchange(box.value) },
    options.map(([key, text, off]) => el('option', { value: key, disabled: Boolean(off), title: off || null }, off ? `${text} (not stored)` : text)));
  box.value = value;
  return el('label', { class: 'field' }, el('span', {}, label), box);
}

const CONTROLS = ('NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB '
  + 'ESC FS GS RS US').split(' ');
const NAMED = new Map(Object.entries({
  0x00a0: 'NBSP', 0x00ad: 'SHY', 0x061c: 'ALM', 0x200b: 'ZWSP', 0x200c: 'ZWNJ', 0x200d: 'ZWJ', 0x200e: 'LRM',
  0x200f: 'RLM', 0x2028: 'LS', 0x2029: 'PS', 0x202a: 'LRE', 0x202b: 'RLE', 0x202c: 'PDF', 0x202d: 'LRO',
  0x202e: 'RLO', 0x2060: 'WJ', 0x2066: 'LRI', 0x2067: 'RLI', 0x2068: 'FSI', 0x2069: 'PDI', 0xfeff: 'BOM',
}).map(([code, name]) => [Number(code), name]));

// A character that would be invisible, or would rearrange its neighbors, as a visible sign; null for the others.
function sign(char) {
  const code = char.codePointAt(0);
  if (code < 0x20) return CONTROLS[code];
  if (code === 0x7f) return 'DEL';
  if (NAMED.has(code)) return NAMED.get(code);
  if (/[\p{Cc}\p{Cf}\p{Cs}\p{Co}]/u.test(char)) return 'U+' + code.toString(16).toUpperCase().padStart(4, '0');
  return null;
}

// Text with what cannot be seen made visible. `token`: spaces, tabs and line ends are marked as well, and the line
// ends that close a token are only marked (the caller breaks the line after the token, or its box would be split).
function visible(text, token = false) {
  const parts = [];
  let plain = '';
  const flush = () => {
    if (plain) parts.push(document.createTextNode(plain));
    plain = '';
  };
  const mark = (symbol, kind, after = '', before = []) => {
    flush();
    parts.push(...before, el('span', { class: kind }, symbol));
    plain = after;
  };
  const body = text.replace(/\n+$/, '').length;
  let at = 0;
  if (token && /^\p{M}/u.test(text)) plain = '\u25cc';
  for (const char of text) {
    if (char === '\n') token ? mark('\u23ce', 'space', at < body ? '\n' : '') : (plain += char);
    else if (char === '\t') token ? mark('\u21e5', 'space', '\t') : (plain += char);
    else if (char === ' ') token ? mark('\u00b7', 'space', '', at ? [el('wbr')] : []) : (plain += char);
    else {
      const symbol = sign(char);
      symbol ? mark(symbol, 'sign') : (plain += char);
    }
    at += char.length;
  }
  flush();
  if (!parts.length) parts.push(el('span', { class: 'sign' }, 'empty'));
  return parts;
}

// A name that may wrap after its punctuation rather than inside a word.
function breakable(text) {
  return text.split(/(?<=[_:/.])/).flatMap((part) => [...visible(part), el('wbr')]);
}

function number(value, unit = '') {
  if (value === null || value === undefined) return '\u2013';
  if (unit === '%') return `${trim((100 * value).toFixed(1))} %`;
  const size = Math.abs(value);
  let text;
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) text = value.toExponential(2);
  else if (size >= 1000) text = Math.round(value).toLocaleString('en');
  else text = trim(value.toPrecision(4));
  return (unit && unit !== '%' ? `${text} ${unit}` : text).replace('-', '\u2212');
}

function trim(text) {
  return text.includes('.') && !text.includes('e') ? text.replace(/\.?0+$/, '') : text;
}

function signed(value, unit) {
  const text = unit === '%' ? trim((100 * value).toFixed(1)) + ' points' : number(value).replace('\u2212', '-');
  return (value > 0 ? '+' : '') + text.replace('-', '\u2212');
}

function plural(count, word) {
  return `${count.toLocaleString('en')} ${word}${count === 1 ? '' : 's'}`;
}

// The state that a link can carry, kept in the URL after #: step, prompt, row, quantity, token, algorithm, theme, ...
const state = {
  values: new Map(),
  read() {
    const hash = location.hash.slice(1);
    this.values = new Map(hash.includes('=') ? new URLSearchParams(hash) : []);
  },
  get(name) { return this.values.get(name) ?? null; },
  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      if (value === null) this.values.delete(name);
      else this.values.set(name, String(value));
    }
    const text = new URLSearchParams([...this.values]).toString();
    history.replaceState(null, '', text ? `#${text}` : location.pathname + location.search);
  },
};
