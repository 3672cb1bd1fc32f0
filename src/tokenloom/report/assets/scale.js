// From a number to a color: white at zero, blue below, orange above (told apart by all common kinds of color vision).

const SIGNED = ['advantage', 'coefficient', 'log_ratio'];
const MEANINGS = {
  advantage: 'credit of the token: above 0 it is made more likely, below 0 less',
  coefficient: 'what the loss does to the token: \u2212\u2202loss/\u2202logprob',
  log_ratio: 'log of the trainer\u2019s over the sampler\u2019s probability (nats)',
  kl: 'estimate of the KL divergence from the reference at the token: e^d \u2212 1 \u2212 d, d = log reference \u2212 log policy (nats)',
  probability: 'probability of the token under the policy',
  entropy: 'entropy of the policy before the token (nats)',
  logprob: 'log-probability of the token (nats)',
  weight: 'weight of the token in the loss',
};

// The end of the scale. A few extreme tokens must not bleach all others, so many values are clipped at a percentile.
function makeScale(values, signedScale) {
  const finite = Float64Array.from(values.filter((v) => v !== null));
  const sizes = finite.map(Math.abs).sort();
  const largest = sizes.at(-1) ?? 0;
  const high = sizes[Math.floor(0.99 * (sizes.length - 1))] ?? 0;
  const clipped = sizes.length >= 100 && high > 0 && largest > 2 * high;
  const limit = (clipped ? high : largest) || 1;
  const negative = signedScale || finite.some((v) => v < 0);
  const positive = signedScale || finite.some((v) => v > 0) || !negative;
  return { limit, largest, clipped, low: negative ? -limit : 0, high: positive ? limit : 0, empty: !finite.length };
}

function paint(node, value, scale) {
  const share = Math.min(1, Math.abs(value) / scale.limit);
  if (value === 0) node.classList.add('zero');
  node.classList.add(value < 0 ? 'below' : 'above');
  // A square root would exaggerate noise; a slight lift keeps small values apart from zero.
  node.style.setProperty('--share', `${(100 * share ** 0.8).toFixed(1)}%`);
}

function legend(scale, view, variants) {
  const bar = el('div', { class: 'ramp', 'aria-hidden': 'true' });
  const steps = 21;
  for (let i = 0; i < steps; i++) {
    const swatch = el('i');
    paint(swatch, scale.low + ((scale.high - scale.low) * i) / (steps - 1), scale);
    bar.append(swatch);
  }
  const name = view.mode === 'difference'
    ? `${view.quantity}: ${variants[view.algorithm].name} \u2212 ${variants[view.against].name}` : view.quantity;
  const both = scale.low < 0 && scale.high > 0;
  const labels = both ? [scale.low, 0, scale.high] : [scale.low, scale.high];
  const masked = view.here.some((r) => store.mask.subarray(r.offset, r.offset + r.length).includes(0));
  return el('div', { class: 'scale', role: 'note', 'aria-label': `Color scale of ${name}` },
    el('div', { class: 'scale-bar' }, bar,
      el('div', { class: 'scale-labels' }, labels.map((v) => el('span', {},
        (scale.clipped && v !== 0 ? (v < 0 ? '\u2264 ' : '\u2265 ') : '') + number(v))))),
    el('p', { class: 'muted' },
      el('b', {}, visible(name)), MEANINGS[view.quantity] ? `: ${MEANINGS[view.quantity]}. ` : '. ',
      scale.empty ? 'No value here. ' : '',
      both ? [el('span', { class: 'swatch tok above' }, 'line above'), ' positive, ',
        el('span', { class: 'swatch tok below' }, 'line below'), ' negative. '] : '',
      scale.clipped ? `Colors end at the 99th percentile; the largest size is ${number(scale.largest)}. ` : '',
      masked ? [el('span', { class: 'swatch tok masked' }, 'hatched'), ' not sampled by the policy (tool output). '] : '',
      el('span', { class: 'swatch tok unknown' }, 'dotted'), ' no value.'));
}
