'use strict';
// Pictures: areas over time, a map of memory, a matrix of pairs.
(function () {
  const { svg, html } = samepage;

  /** Marks on an axis of bytes up to `most`: powers of two, 2 to 5 of them. */
  function ticks(most) {
    const step = 2 ** Math.max(0, Math.ceil(Math.log2(most / 4)));
    const all = [];
    for (let at = 0; at <= most; at += step) all.push(at);
    return all;
  }

  /** Marks on an axis of time: some seconds, minutes or hours apart. */
  function times(seconds, most) {
    const steps = [1, 2, 3, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
    const step = steps.find((step) => seconds / step <= most) || 86400 * Math.ceil(seconds / 86400 / most);
    const all = [];
    for (let at = 0; at <= seconds; at += step) all.push(at);
    return all;
  }

  /**
   * Series stacked on each other over time. `points` are `{ time, values }`, in order of time; `series` are
   * `{ name, colour }`, from the bottom up; `format` writes values; `span` is the least number of seconds of what
   * goes on. What has ended is shown from its first moment to its last.
   */
  samepage.areas = function (into, { points, series, format, span = 60, ended = false }) {
    const width = into.clientWidth;
    const height = into.clientHeight;
    if (width < 50 || points.length === 0) return;
    // A single moment is drawn as a short time.
    if (points.length === 1) points = [{ ...points[0], time: points[0].time - 1 }, points[0]];
    const [left, right, top, bottom] = [64, 8, 8, 22];
    const last = points[points.length - 1].time;
    const first = Math.min(points[0].time, last - (ended ? 1 : span));
    const sum = (point) => point.values.reduce((all, value) => all + Math.max(0, value), 0);
    const most = Math.max(1, ...points.map(sum)) * 1.08;
    const x = (time) => left + ((time - first) / (last - first)) * (width - left - right);
    const y = (value) => height - bottom - (value / most) * (height - top - bottom);
    const picture = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img' });
    picture.append(svg('title', {}, series.map((one) => one.name).join(', ') + ' over time'));
    for (const tick of ticks(most)) {
      picture.append(
        svg('line', { class: 'grid', x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        svg('text', { x: left - 8, y: y(tick) + 4, 'text-anchor': 'end' }, format(tick)),
      );
    }
    for (const ago of times(last - first, Math.max(3, Math.floor(width / 110)))) {
      const at = ended ? first + ago : last - ago;
      const text = ended ? samepage.duration(ago) : ago === 0 ? 'now' : '−' + samepage.duration(ago);
      const place = x(at) > width - right - 14 ? 'end' : x(at) < left + 14 ? 'start' : 'middle';
      picture.append(svg('text', { x: x(at), y: height - 4, 'text-anchor': place }, text));
    }
    let below = points.map(() => 0);
    series.forEach((one, index) => {
      const above = points.map((point, at) => below[at] + Math.max(0, point.values[index]));
      const line = points.map((point, at) => `${x(point.time).toFixed(1)},${y(above[at]).toFixed(1)}`);
      const back = points.map((point, at) => `${x(point.time).toFixed(1)},${y(below[at]).toFixed(1)}`).reverse();
      const colour = `var(--${one.colour})`;
      picture.append(
        svg('path', { d: `M${line.join('L')}L${back.join('L')}Z`, style: { fill: colour, opacity: '.22' } }),
        svg('path', {
          d: `M${line.join('L')}`,
          style: { fill: 'none', stroke: colour, strokeWidth: '1.75', strokeLinejoin: 'round' },
        }),
      );
      below = above;
    });
    const cursor = svg('line', { class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden' });
    picture.append(cursor);
    samepage.tip(picture, (event) => {
      const box = picture.getBoundingClientRect();
      const time = first + ((event.clientX - box.left - left) / (width - left - right)) * (last - first);
      const near = points.reduce((best, point) =>
        Math.abs(point.time - time) < Math.abs(best.time - time) ? point : best);
      cursor.setAttribute('visibility', 'visible');
      cursor.setAttribute('x1', x(near.time));
      cursor.setAttribute('x2', x(near.time));
      const when = ended
        ? `after ${samepage.duration(near.time - points[0].time)}`
        : `${samepage.duration(last - near.time)} ago`;
      return [when, ...series.map((one, index) => `${one.name}: ${format(near.values[index])}`)].join('\n');
    });
    picture.addEventListener('pointerleave', () => cursor.setAttribute('visibility', 'hidden'));
    into.replaceChildren(picture);
  };

  /** A bar of parts: `parts` are `{ name, value, colour }`. */
  samepage.meter = function (parts, whole, label) {
    const all = Math.max(whole, parts.reduce((sum, part) => sum + part.value, 0), 1);
    const bars = parts.map((part) =>
      html('i', { style: { width: (100 * part.value) / all + '%', background: `var(--${part.colour})` } }));
    const said = parts.map((part) => `${part.name}: ${samepage.bytes(part.value)}`).join('\n');
    return html('div', { class: 'meter', role: 'img', 'aria-label': label + ' ' + said, tip: said }, bars);
  };

  /**
   * Memory as a picture, from its first page at the top left to its last at the bottom right. Each cell is a
   * run of pages in the mixed colour of what they are. `colours` gives one for each kind.
   */
  samepage.memoryMap = function (canvas, cells, kind, colours) {
    const columns = cells.length >= 2048 ? 128 : cells.length >= 512 ? 64 : 32;
    const rows = Math.ceil(cells.length / columns);
    if (canvas.width !== columns || canvas.height !== rows) {
      canvas.width = columns;
      canvas.height = rows;
      canvas.style.aspectRatio = `${columns} / ${rows * 1.15}`;
    }
    const context = canvas.getContext('2d');
    const image = context.createImageData(columns, rows);
    const ground = samepage.rgb(samepage.colour('absent'));
    const palette = Object.fromEntries(
      Object.entries(colours).map(([name, colour]) => [name, samepage.rgb(colour)]));
    cells.forEach((cell, index) => {
      let known = 0;
      const mixed = [0, 0, 0];
      for (const [name, count] of Object.entries(cell[kind] || {})) {
        const colour = palette[name] || ground;
        known += count;
        for (let part = 0; part < 3; part += 1) mixed[part] += count * colour[part];
      }
      for (let part = 0; part < 3; part += 1) {
        image.data[4 * index + part] = known ? Math.round(mixed[part] / known) : ground[part];
      }
      image.data[4 * index + 3] = 255;
    });
    context.putImageData(image, 0, 0);
    canvas.cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      return cells[row * columns + column];
    };
  };

  /** What pairs of VMs have in common: `pages(a, b)` of VMs by their places in `names`. */
  samepage.matrix = function (into, names, pages) {
    let canvas = into.querySelector('canvas');
    if (!canvas) {
      canvas = html('canvas', { role: 'img', 'aria-label': 'Pages that pairs of VMs have in common' });
      samepage.tip(canvas, (event) => canvas.tipAt(event));
      into.replaceChildren(canvas);
    }
    const count = names.length;
    const width = into.clientWidth;
    if (width < 50) return;
    const scale = devicePixelRatio || 1;
    const font = count > 20 ? 9 : 11;
    const face = `${font}px system-ui, sans-serif`;
    const context = canvas.getContext('2d');
    context.font = face;
    // On a narrow screen, the cells matter more than the names.
    const room = Math.max(7, Math.min(14, Math.floor(width / (count > 8 ? 30 : 24))));
    const shown = names.map((name) => samepage.middle(name, room));
    const label = Math.ceil(Math.max(24, ...shown.map((name) => context.measureText(name).width))) + 8;
    const cell = Math.min(84, (width - label) / count);
    // Names that are wider than their columns are rotated.
    const upright = label - 8 > cell - 4;
    const top = upright ? label : font + 10;
    const height = top + cell * count + 2;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = height + 'px';
    context.scale(scale, scale);
    context.font = face;
    const values = names.map((_, a) => names.map((_, b) => (a === b ? 0 : pages(a, b))));
    const most = Math.max(1, ...values.flat());
    const [ground, colour] = [samepage.colour('absent'), samepage.colour('saved')].map(samepage.rgb);
    const gap = cell > 14 ? 2 : 1;
    const muted = samepage.colour('muted');
    names.forEach((_, a) => {
      context.fillStyle = muted;
      context.textAlign = 'right';
      context.textBaseline = 'middle';
      if (cell >= font - 1 || a % 2 === 0) context.fillText(shown[a], label - 8, top + (a + 0.5) * cell);
      context.save();
      context.translate(label + (a + 0.5) * cell, top - 6);
      if (upright) {
        context.rotate(-Math.PI / 2);
        context.textAlign = 'left';
      } else {
        context.textAlign = 'center';
        context.textBaseline = 'alphabetic';
      }
      if (cell >= font - 1 || a % 2 === 0) context.fillText(shown[a], 0, 0);
      context.restore();
      names.forEach((_, b) => {
        const part = Math.sqrt(values[a][b] / most);
        const mixed = ground.map((from, at) => Math.round(from + (colour[at] - from) * part));
        context.fillStyle = a === b ? samepage.colour('raised') : `rgb(${mixed})`;
        context.beginPath();
        context.roundRect(label + b * cell, top + a * cell, cell - gap, cell - gap, Math.min(5, cell / 5));
        context.fill();
        if (cell >= 44 && a !== b) {
          context.fillStyle = part > 0.55 ? '#fff' : samepage.colour('ink');
          context.textAlign = 'center';
          context.textBaseline = 'middle';
          const text = samepage.amount(values[a][b] * 4096);
          context.fillText(text[0], label + (b + 0.5) * cell - gap / 2, top + (a + 0.5) * cell - 6);
          context.fillText(text[1], label + (b + 0.5) * cell - gap / 2, top + (a + 0.5) * cell + 7);
        }
      });
    });
    canvas.tipAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const b = Math.floor((event.clientX - box.left - label) / cell);
      const a = Math.floor((event.clientY - box.top - top) / cell);
      if (a < 0 || b < 0 || a >= count || b >= count || a === b) return '';
      return `${names[a]} and ${names[b]}\n${samepage.bytes(values[a][b] * 4096)} in common`;
    };
  };
})();
