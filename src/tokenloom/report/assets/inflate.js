// Deflated numbers back to bytes: by the browser where it can, else by the decoder below (RFC 1950 and 1951).

async function inflate(packed) {
  if (typeof DecompressionStream === 'undefined') return plainInflate(packed);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

// From code lengths to what canonical decoding needs: how many codes of each length, and symbols in code order.
function huffman(lengths) {
  const counts = new Uint16Array(16);
  for (const n of lengths) counts[n]++;
  counts[0] = 0;
  const starts = new Uint16Array(17);
  for (let n = 1; n < 16; n++) starts[n + 1] = starts[n] + counts[n];
  const symbols = new Uint16Array(lengths.length);
  lengths.forEach((n, symbol) => { if (n) symbols[starts[n]++] = symbol; });
  return { counts, symbols };
}

function plainInflate(packed) {
  let out = new Uint8Array(4 * packed.length + 1024);
  let size = 0;
  let at = 2; // behind the zlib header
  let held = 0;
  let count = 0;
  const take = (n) => {
    while (count < n) { held |= packed[at++] << count; count += 8; }
    const value = held & ((1 << n) - 1);
    held >>>= n;
    count -= n;
    return value;
  };
  const decode = ({ counts, symbols }) => {
    for (let n = 1, code = 0, first = 0, index = 0; n < 16; n++) {
      code |= take(1);
      if (code - counts[n] < first) return symbols[index + code - first];
      index += counts[n];
      first = (first + counts[n]) << 1;
      code <<= 1;
    }
    throw new Error('the packed numbers are damaged');
  };
  const room = (n) => {
    if (size + n <= out.length) return;
    const grown = new Uint8Array(2 * out.length + n);
    grown.set(out);
    out = grown;
  };
  const tables = () => {
    const [literals, distances, codes] = [take(5) + 257, take(5) + 1, take(4) + 4];
    const short = new Array(19).fill(0);
    for (let i = 0; i < codes; i++) short[ORDER[i]] = take(3);
    const table = huffman(short);
    const lengths = [];
    while (lengths.length < literals + distances) {
      const symbol = decode(table);
      if (symbol < 16) { lengths.push(symbol); continue; }
      const [value, times] = symbol === 16 ? [lengths.at(-1), 3 + take(2)] : [0, symbol === 17 ? 3 + take(3) : 11 + take(7)];
      for (let i = 0; i < times; i++) lengths.push(value);
    }
    return [huffman(lengths.slice(0, literals)), huffman(lengths.slice(literals))];
  };
  const fixed = () => [
    huffman(Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8))), huffman(new Array(30).fill(5)),
  ];
  for (let last = 0; !last;) {
    last = take(1);
    const kind = take(2);
    if (kind === 0) {
      [held, count] = [0, 0];
      const n = packed[at] | (packed[at + 1] << 8);
      room(n);
      out.set(packed.subarray(at + 4, at + 4 + n), size);
      size += n;
      at += 4 + n;
      continue;
    }
    const [literals, distances] = kind === 1 ? fixed() : tables();
    for (let symbol; (symbol = decode(literals)) !== 256;) {
      room(258);
      if (symbol < 256) { out[size++] = symbol; continue; }
      const s = symbol - 257;
      const bits = s < 8 || s === 28 ? 0 : (s - 4) >> 2;
      const length = s === 28 ? 258 : (s < 8 ? s + 3 : ((4 + (s & 3)) << bits) + 3) + take(bits);
      const d = decode(distances);
      const more = d < 4 ? 0 : (d - 2) >> 1;
      const back = (d < 4 ? d + 1 : ((2 + (d & 1)) << more) + 1) + take(more);
      for (let i = 0; i < length; i++, size++) out[size] = out[size - back];
    }
  }
  return out.subarray(0, size);
}
