// Scales: functions from values to pixels, with the ticks of their axis.

function linear([low, high], [from, to]) {
  const scale = (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  scale.ticks = (count) => {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const first = Math.ceil(low / step - 1e-9);
    const number = Math.max(0, Math.floor(high / step + 1e-9) - first + 1);
    return Array.from({ length: number }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  };
  return scale;
}

function logarithmic([low, high], range) {
  const line = linear([Math.log10(low), Math.log10(high)], range);
  const scale = (value) => line(Math.log10(value));
  scale.invert = (pixel) => low * (high / low) ** ((pixel - range[0]) / (range[1] - range[0]));
  scale.ticks = (count) => {
    const decades = Math.log10(high / low);
    const every = Math.max(1, Math.ceil(decades / count));
    const factors = decades < 2 ? [1, 2, 5] : [1];
    const first = Math.floor(Math.log10(low));
    const powers = Array.from({ length: Math.ceil(decades) + 2 }, (_, i) => first + i).filter((p) => p % every === 0);
    return powers
      .flatMap((power) => factors.map((factor) => factor * 10 ** power))
      .filter((t) => t >= low && t <= high);
  };
  return scale;
}

// The span of some values with a share of it added at both ends.
function widened(values, share = 0.06) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const more = (high - low || Math.abs(high) || 1) * share;
  return [low - more, high + more];
}
