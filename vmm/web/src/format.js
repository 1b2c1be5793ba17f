'use strict';
// Formats numbers and makes elements.
var samepage = {};

(function () {
  const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

  /** An amount of memory as its number and its unit. */
  samepage.amount = function (bytes) {
    let value = Math.abs(bytes);
    let unit = 0;
    while (value >= 1023.5 && unit < UNITS.length - 1) {
      value /= 1024;
      unit += 1;
    }
    const digits = unit === 0 || value >= 99.95 ? 0 : 1;
    return [(bytes < 0 ? '−' : '') + value.toFixed(digits), UNITS[unit]];
  };

  samepage.bytes = function (bytes) {
    return bytes === undefined || bytes === null ? '–' : samepage.amount(bytes).join(' ');
  };

  samepage.rate = function (bytes) {
    return bytes === undefined || bytes === null ? '–' : samepage.bytes(bytes) + '/s';
  };

  samepage.count = function (number) {
    return Math.round(number).toLocaleString('en-US').replaceAll(',', ' ');
  };

  samepage.percent = function (part, whole, digits = 0) {
    return (whole > 0 ? (100 * part) / whole : 0).toFixed(digits) + ' %';
  };

  /** Seconds as a length of time. */
  samepage.duration = function (seconds) {
    const s = Math.round(seconds);
    if (s < 120) return s + ' s';
    if (s < 7200) return Math.round(s / 60) + ' min';
    return s < 172800 ? Math.round(s / 3600) + ' h' : Math.round(s / 86400) + ' d';
  };

  /** A text in this number of characters, cut in the middle, because most names differ at their ends. */
  samepage.middle = function (text, room) {
    const letters = [...text];
    if (letters.length <= room) return text;
    const end = Math.ceil((room - 1) / 2);
    return letters.slice(0, room - 1 - end).join('') + '…' + letters.slice(letters.length - end).join('');
  };

  /** A name that is cut in the middle where there is no room for it, and shown as a whole at the pointer. */
  samepage.name = function (name) {
    const letters = [...name];
    // A short text needs no cut.
    const end = letters.length > 12 ? Math.min(12, Math.ceil(letters.length / 2)) : letters.length;
    const [start, rest] = [letters.slice(0, letters.length - end), letters.slice(letters.length - end)];
    return samepage.html('b', { class: 'vm', title: name },
      start.length > 0 ? samepage.html('span', {}, start.join('')) : undefined,
      samepage.html('span', {}, rest.join('')));
  };

  /** Names in the order in which people count. */
  samepage.natural = new Intl.Collator('en', { numeric: true }).compare;

  function make(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === false) continue;
      if (name === 'onclick') element.addEventListener('click', value);
      else if (name === 'tip') samepage.tip(element, value);
      else if (name === 'style') Object.assign(element.style, value);
      else element.setAttribute(name, value === true ? '' : value);
    }
    // Text is never parsed as HTML, because users choose names.
    element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null));
    return element;
  }

  samepage.html = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
  samepage.svg = (tag, attributes, ...children) =>
    make(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);

  /** A colour of the style sheet, as it is now. */
  samepage.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

  /** A colour as red, green and blue. */
  const parsed = new Map();
  samepage.rgb = function (colour) {
    if (!parsed.has(colour)) {
      const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      parsed.set(colour, [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
    }
    return parsed.get(colour);
  };

  /** Shows a text at the pointer; `text` is asked for it with the event. */
  samepage.tip = function (element, text) {
    const tip = () => document.getElementById('tip');
    element.addEventListener('pointermove', (event) => {
      const said = typeof text === 'function' ? text(event) : text;
      const box = tip();
      box.hidden = !said;
      if (!said) return;
      box.textContent = said;
      const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
      const below = event.clientY + 18;
      const top = below + box.offsetHeight > innerHeight - 8 ? event.clientY - box.offsetHeight - 12 : below;
      Object.assign(box.style, { left: left + 'px', top: top + 'px' });
    });
    element.addEventListener('pointerleave', () => (tip().hidden = true));
  };
})();
