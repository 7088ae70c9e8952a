/* What pages of results draw with. */
const NS = "http:" + "//www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const one = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  one.append(...children);
  return one;
}
function drawn(name, attributes = {}, text) {
  const one = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
  if (text !== undefined) one.textContent = text;
  return one;
}
function time(us) {
  if (us === undefined) return "–";
  if (us >= 1e6) return (us / 1e6).toPrecision(3) + " s";
  if (us >= 1e3) return (us / 1e3).toPrecision(3) + " ms";
  return us >= 100 ? us.toFixed(0) + " µs" : us.toPrecision(3) + " µs";
}
function number(value) {
  if (value >= 1e6) return (value / 1e6).toPrecision(3) + " M";
  if (value >= 1e4) return (value / 1e3).toPrecision(3) + " k";
  return String(+value.toPrecision(value >= 100 ? 4 : 3));
}
