'use strict';
// Shows frames. A frame is the state of the process and its VMs at one moment:
//   { time, enabled, guest, resident, private, saved, engine, cache, vms, pairs }
// with sizes in bytes and times in seconds. Maps of memory are separate, by name of the VM.
(function () {
  const { html, bytes, rate, count, percent, duration, natural } = samepage;
  const byId = (id) => document.getElementById(id);
  /** Moments that are kept. */
  const HISTORY = 1800;
  /** VMs of the matrix at most. */
  const MATRIX = 32;

  const MEMORY = [
    { name: 'resident', colour: 'resident' },
    { name: 'saved by sharing', colour: 'saved' },
  ];
  const SOURCES = [
    { name: 'another guest', colour: 'saved', of: (io) => io.guests },
    { name: 'host cache', colour: 'host', of: (io) => io.host },
    { name: 'disk', colour: 'disk', of: (io) => io.disk },
  ];
  const PARTS = [
    { name: 'shared', colour: 'saved', of: (vm) => vm.shared },
    { name: 'private', colour: 'private', of: (vm) => vm.private },
    { name: 'zeros freed', colour: 'zero', of: (vm) => vm.zero },
  ];
  const STATES = { shared: 'saved', private: 'private', zero: 'zero', absent: 'absent' };
  const STATE_NAMES = { shared: 'shared', private: 'private', zero: 'zeros freed', absent: 'never touched' };
  // As in the pictures of `samepage report types`. Free and untouched pages have faint colours.
  const TYPES = {
    anonymous: '#dd7f35', file_mapped: '#1f9d6b', file_unmapped: '#29a3b5', slab: '#8a63c9', page_table: '#d1549b',
    compound: '#c9a227', balloon: '#4d5f7a', unknown: '#93a4bd', free: null,
  };
  const OTHER_TYPES = ['#3a6fd8', '#7cc7a4', '#a05a2c', '#cf3f3f'];

  class Page {
    /** `act(vm, action)` is there where VMs can be steered. */
    constructor({ act, ended = false } = {}) {
      this.act = act;
      this.ended = ended;
      this.points = [];
      this.frame = null;
      this.cards = new Map();
      this.kind = 'states';
      this.sort = { by: 'name', down: false };
      /** What was read a second, by source, between the last two looks at the cache. */
      this.rates = SOURCES.map(() => 0);
      byId('maps-switch').addEventListener('click', (event) => {
        const kind = event.target.dataset.kind;
        if (!kind) return;
        this.kind = kind;
        for (const button of byId('maps-switch').children) {
          button.setAttribute('aria-pressed', button.dataset.kind === kind);
        }
        this.drawMaps();
      });
      theme(() => this.draw());
      let waiting = 0;
      addEventListener('resize', () => {
        cancelAnimationFrame(waiting);
        waiting = requestAnimationFrame(() => this.draw());
      });
    }

    /** Takes a frame in, without drawing it. */
    add(frame) {
      const before = this.frame;
      this.frame = frame;
      const seconds = before ? frame.time - before.time : 0;
      // CPU time and disk counters are those of the request, even if there is no new sample of memory.
      const asked = before && frame.asked !== undefined ? frame.asked - before.asked : seconds;
      this.engineCpu = asked > 0
        ? Math.max(0, frame.engine.cpu_seconds - before.engine.cpu_seconds) / asked : undefined;
      const earlier = new Map((before?.vms || []).map((vm) => [vm.name, vm]));
      for (const vm of frame.vms || []) {
        const old = earlier.get(vm.name);
        const since = old && vm.asked !== undefined ? vm.asked - old.asked : seconds;
        const known = old && since > 0 && vm.io && old.io;
        vm.rates = known
          ? SOURCES.map((source) => Math.max(0, source.of(vm.io) - source.of(old.io)) / since) : undefined;
        vm.cpu = known ? Math.max(0, vm.cpu_seconds - old.cpu_seconds) / since : undefined;
      }
      if (before && seconds <= 0) return;
      // The cache's figures may come from another sample than the rest.
      const since = before ? (frame.cache.time ?? frame.time) - (before.cache.time ?? before.time) : 0;
      if (since > 0) {
        this.rates = SOURCES.map((source) =>
          Math.max(0, source.of(frame.cache) - source.of(before.cache)) / since);
      }
      this.points.push({
        time: frame.time, memory: [frame.resident, Math.max(0, frame.saved)], rates: this.rates,
      });
      if (this.points.length > HISTORY) this.points.shift();
    }

    draw() {
      if (!this.frame) return;
      this.drawTiles();
      this.drawMemory();
      this.drawCache();
      this.drawMaps();
      this.drawMatrix();
      this.drawTable();
    }

    drawTiles() {
      const { frame } = this;
      const saved = Math.max(0, frame.saved);
      const needed = frame.resident + saved;
      const running = frame.vms.filter((vm) => vm.state === 'running').length;
      const reads = SOURCES.map((source) => source.of(frame.cache));
      const read = reads.reduce((all, value) => all + value, 0);
      const tile = (name, value, more, extra, special = '') => {
        const [number, unit] = Array.isArray(value) ? value : [value, ''];
        return html('div', { class: 'tile ' + special },
          html('div', { class: 'name' }, name),
          html('div', { class: 'value' }, number, html('small', {}, unit && ' ' + unit)),
          extra,
          html('div', { class: 'more' }, more));
      };
      const meter = samepage.meter(
        [{ name: 'resident', value: frame.resident, colour: 'resident' }, { name: 'saved', value: saved, colour: 'saved' }],
        needed, 'Memory needed without sharing:');
      const cpu = this.ended
        ? ['CPU for sharing', [frame.engine.cpu_seconds.toFixed(1), 's']]
        : ['CPU for sharing', [this.engineCpu === undefined ? '–' : (100 * this.engineCpu).toFixed(1), '%']];
      byId('tiles').replaceChildren(
        tile('Saved by sharing', samepage.amount(saved),
          `${percent(saved, needed)} less than ${bytes(needed)}`, meter, 'saved'),
        tile('Resident', samepage.amount(frame.resident), `${bytes(frame.private)} private`),
        tile('Promised to guests', samepage.amount(frame.guest),
          frame.resident > 0 ? `${(frame.guest / frame.resident).toFixed(1)} × what is resident` : ''),
        tile('Virtual machines', [String(frame.vms.length), ''],
          this.ended ? `${count(frame.engine.merges)} pages merged` : `${running} running`),
        tile(...cpu, frame.enabled ? `${thousands(frame.engine.pages_scanned)} pages seen` : 'sharing is off'),
        tile('Reads spared the disk', read > 0 ? [((100 * (reads[0] + reads[1])) / read).toFixed(0), '%'] : '–',
          read > 0 ? `of ${bytes(read)}` : 'nothing read yet'));
    }

    drawMemory() {
      const point = this.points[this.points.length - 1];
      legend(byId('memory-legend'), MEMORY.map((one, at) => [one.name, one.colour, bytes(point.memory[at])]));
      const points = this.points.map(({ time, memory }) => ({ time, values: memory }));
      samepage.areas(byId('memory-chart'), { points: thin(points), series: MEMORY, format: bytes, ended: this.ended });
    }

    drawCache() {
      const { cache } = this.frame;
      const totals = SOURCES.map((source) => source.of(cache));
      const all = totals.reduce((sum, value) => sum + value, 0);
      byId('cache-total').replaceChildren(
        html('div', { class: 'sources' }, SOURCES.map((source, at) => [
          html('span', {}, source.name),
          html('span', { class: 'track' }, html('i', {
            style: { width: (all ? (100 * totals[at]) / all : 0) + '%', background: `var(--${source.colour})` },
          })),
          html('span', { class: 'number' }, bytes(totals[at])),
          html('span', { class: 'number muted' }, percent(totals[at], all)),
        ])));
      if (all === 0) {
        byId('cache-chart').replaceChildren(
          html('div', { class: 'empty' }, 'No guest has read from a disk through the block cache yet.'));
      } else {
        const points = this.points.map(({ time, rates }) => ({ time, values: rates }));
        samepage.areas(byId('cache-chart'), { points: thin(points), series: SOURCES, format: rate, ended: this.ended });
      }
      byId('cache-note').textContent =
        `The host keeps ${bytes(cache.cached)} of at most ${bytes(cache.limit)}; guests hold ${bytes(cache.in_guests)} ` +
        'in frames of their own.';
    }

    /** Has a VM's map drawn, from its cells. */
    map(name, cells) {
      const card = this.cards.get(name);
      if (!card) return;
      card.cells = cells;
      this.drawMap(card);
    }

    /** The names of VMs whose maps can be seen now. */
    mapsInSight() {
      return [...this.cards].filter(([, card]) => {
        const box = card.canvas.getBoundingClientRect();
        return card.live && box.bottom > 0 && box.top < innerHeight;
      }).map(([name]) => name);
    }

    drawMaps() {
      const { vms } = this.frame;
      const panel = byId('maps');
      const shown = [...vms].sort((a, b) => natural(a.name, b.name));
      panel.style.setProperty('--card', vms.length > 24 ? '132px' : vms.length > 6 ? '190px' : '300px');
      const names = new Set(shown.map((vm) => vm.name));
      for (const [name, card] of this.cards) {
        if (names.has(name)) continue;
        card.figure.remove();
        this.cards.delete(name);
      }
      panel.querySelector('.empty')?.remove();
      if (shown.length === 0) panel.append(html('div', { class: 'empty' }, 'There are no VMs.'));
      shown.forEach((vm, at) => {
        if (!this.cards.has(vm.name)) this.cards.set(vm.name, this.card(vm.name));
        const card = this.cards.get(vm.name);
        if (panel.children[at] !== card.figure) panel.insertBefore(card.figure, panel.children[at] || null);
        card.live = vm.resident !== undefined && vm.resident !== null;
        card.figure.classList.toggle('ended', !card.live);
        card.text.textContent = card.live
          ? (vms.length > 24 ? bytes(vm.saved) : `${bytes(vm.resident)} resident, ${bytes(vm.saved)} saved`)
          : vm.state;
        this.drawMap(card);
      });
      const named = this.kind === 'states'
        ? Object.keys(STATES).map((state) => [STATE_NAMES[state], STATES[state]])
        : this.types().map((type) => [type, typeColour(type), undefined, true]);
      legend(byId('maps-legend'), named);
      byId('maps-note').textContent = this.kind === 'types' && named.length === 0
        ? 'No agent in a guest says what pages are used for.' : '';
    }

    card(name) {
      const canvas = html('canvas', { role: 'img', 'aria-label': `Memory of ${name}`, width: 64, height: 16 });
      const text = html('span', {});
      const card = { name, canvas, text, cells: null, live: false };
      card.figure = html('figure', { class: 'map' },
        html('figcaption', {}, samepage.name(name), text), canvas);
      canvas.style.aspectRatio = '64 / 18';
      samepage.tip(canvas, (event) => {
        const cell = card.cells && canvas.cellAt && canvas.cellAt(event);
        if (!cell) return '';
        const first = cell.first_page * 4096;
        const counts = Object.entries(cell[this.kind] || {}).filter(([, pages]) => pages > 0);
        const said = counts.sort((a, b) => b[1] - a[1]).map(([kind, pages]) =>
          `${kindName(this.kind, kind)}: ${count(pages)} of ${count(cell.pages)} pages`);
        return [`${name}, from ${bytes(first)} to ${bytes(first + cell.pages * 4096)}`, ...said].join('\n');
      });
      return card;
    }

    drawMap(card) {
      if (!card.cells || card.cells.length === 0) return;
      const colours = this.kind === 'states'
        ? Object.fromEntries(Object.entries(STATES).map(([state, colour]) => [state, samepage.colour(colour)]))
        : Object.fromEntries(this.types().map((type) => [type, typeColour(type)]));
      samepage.memoryMap(card.canvas, card.cells, this.kind, colours);
      card.canvas.setAttribute('aria-label', `Memory of ${card.name}: ${this.sums(card.cells)}`);
    }

    /** What cells come to, in words. */
    sums(cells) {
      const sums = {};
      let all = 0;
      for (const cell of cells) {
        all += cell.pages;
        for (const [kind, pages] of Object.entries(cell[this.kind] || {})) sums[kind] = (sums[kind] || 0) + pages;
      }
      const kinds = Object.entries(sums).filter(([, pages]) => pages > 0).sort((a, b) => b[1] - a[1]);
      return kinds.map(([kind, pages]) => `${percent(pages, all)} ${kindName(this.kind, kind)}`).join(', ') || 'unknown';
    }

    /** All types of pages that any map has, in the order of their colours. */
    types() {
      const all = new Set();
      for (const { cells } of this.cards.values()) {
        for (const cell of cells || []) {
          for (const [type, pages] of Object.entries(cell.types || {})) if (pages > 0) all.add(type);
        }
      }
      const known = Object.keys(TYPES).filter((type) => all.has(type));
      return [...known, ...[...all].filter((type) => !(type in TYPES)).sort()];
    }

    drawMatrix() {
      const { vms, pairs } = this.frame;
      const held = new Map(vms.map((vm) => [vm.name, 0]));
      for (const pair of pairs) for (const vm of pair.vms) held.set(vm, (held.get(vm) || 0) + pair.pages);
      let shown = vms.filter((vm) => vm.resident !== undefined && vm.resident !== null);
      const all = shown.length;
      if (all > MATRIX) {
        shown.sort((a, b) => held.get(b.name) - held.get(a.name));
        shown = shown.slice(0, MATRIX);
      }
      shown.sort((a, b) => natural(a.group || '', b.group || '') || natural(a.name, b.name));
      if (shown.length < 2) {
        byId('matrix').replaceChildren(
          html('div', { class: 'empty' }, 'Two VMs that run are needed for memory to be shared between them.'));
        byId('matrix-note').textContent = '';
        return;
      }
      const names = shown.map((vm) => vm.name);
      const key = (a, b) => (a < b ? a + '\n' + b : b + '\n' + a);
      const found = new Map(pairs.map((pair) => [key(...pair.vms), pair]));
      samepage.matrix(byId('matrix'), names, (a, b) => found.get(key(names[a], names[b]))?.pages || 0);
      const error = Math.max(0, ...pairs.map((pair) => pair.error || 0));
      byId('matrix-note').textContent =
        'Memory that both VMs of a pair refer to' +
        (error > 0 ? `, estimated to ± ${bytes(error * 4096)}` : '') +
        (all > MATRIX ? `; the ${MATRIX} of ${all} VMs with most in common.` : '.');
    }

    drawTable() {
      const columns = [
        { key: 'name', title: 'Name', of: (vm) => vm.name, cell: (vm) => samepage.name(vm.name) },
        { key: 'state', title: 'State', of: (vm) => vm.state,
          cell: (vm) => html('span', { class: 'state ' + vm.state, tip: vm.reason || '' }, vm.state) },
        { key: 'cpu', title: 'CPU', number: true, of: (vm) => (this.ended ? vm.cpu_seconds : vm.cpu),
          cell: (vm) => (this.ended
            ? (vm.cpu_seconds === undefined ? '–' : vm.cpu_seconds.toFixed(1) + ' s')
            : vm.cpu === undefined ? '–' : (100 * vm.cpu).toFixed(1) + ' %') },
        { key: 'parts', title: 'Memory', grow: true, of: (vm) => vm.memory,
          cell: (vm) => samepage.meter(
            PARTS.map((part) => ({ ...part, value: part.of(vm) || 0 })), vm.memory, `Memory of ${vm.name}:`) },
        { key: 'memory', title: 'Promised', number: true, of: (vm) => vm.memory, cell: (vm) => bytes(vm.memory) },
        { key: 'resident', title: 'Resident', number: true, of: (vm) => vm.resident, cell: (vm) => bytes(vm.resident) },
        { key: 'saved', title: 'Saved', number: true, of: (vm) => vm.saved, cell: (vm) => bytes(vm.saved) },
        { key: 'wanted', title: 'Wants more', number: true, of: (vm) => vm.wanted, cell: (vm) => bytes(vm.wanted) },
        ...SOURCES.map((source, at) => ({
          key: source.name, title: ['From guests', 'From host', 'From disk'][at], number: true,
          of: (vm) => (this.ended ? vm.io && source.of(vm.io) : vm.rates && vm.rates[at]),
          cell: (vm) => (this.ended
            ? bytes(vm.io && source.of(vm.io)) : rate(vm.rates && vm.rates[at])),
        })),
      ];
      if (this.act) columns.push({ key: 'act', title: '', cell: (vm) => this.button(vm) });
      const { by, down } = this.sort;
      const column = columns.find((one) => one.key === by) || columns[0];
      const compare = (a, b) => {
        const [one, other] = [column.of(a), column.of(b)];
        const known = (value) => value !== undefined && value !== null;
        if (known(one) !== known(other)) return known(one) ? -1 : 1;
        const order = typeof one === 'string' ? natural(one, other) : (one || 0) - (other || 0);
        return (down ? -order : order) || natural(a.name, b.name);
      };
      const head = columns.map((one) => html('th', {
        class: one.number ? 'number' : undefined,
        'aria-sort': one.key === by ? (down ? 'descending' : 'ascending') : undefined,
      }, one.of ? html('button', { type: 'button', 'data-column': one.key, onclick: () => {
        this.sort = { by: one.key, down: by === one.key ? !down : Boolean(one.number || one.grow) };
        this.drawTable();
      } }, one.title) : one.title));
      const rows = [...this.frame.vms].sort(compare).map((vm) => html('tr', {}, columns.map((one) =>
        html('td', { class: one.number ? 'number' : one.grow ? 'grow' : undefined }, one.cell(vm)))));
      const focused = document.activeElement?.dataset?.column;
      byId('vms').replaceChildren(html('thead', {}, html('tr', {}, head)), html('tbody', {}, rows));
      if (focused) byId('vms').querySelector(`[data-column="${CSS.escape(focused)}"]`)?.focus();
      legend(byId('vms-legend'), [...PARTS.map((part) => [part.name, part.colour]), ['never touched', 'absent']]);
    }

    button(vm) {
      const action = { running: 'pause', paused: 'resume', created: 'start', stopped: 'start', crashed: 'start', failed: 'start' }[vm.state];
      if (!action) return '';
      return html('button', { type: 'button', class: 'button small', onclick: () => this.act(vm.name, action) },
        action[0].toUpperCase() + action.slice(1));
    }
  }

  function typeColour(type) {
    const sum = [...type].reduce((all, letter) => all + letter.charCodeAt(0), 0);
    return type === 'free' ? samepage.colour('absent') : TYPES[type] || OTHER_TYPES[sum % OTHER_TYPES.length];
  }

  /** A large number in few characters. */
  function thousands(number) {
    return number < 1e5 ? count(number) : count(number / 1000) + ' k';
  }

  /** A state or a type of pages, for people. */
  function kindName(kind, name) {
    return (kind === 'states' && STATE_NAMES[name]) || name;
  }

  /** Names with their colours, and a figure where there is one. */
  function legend(into, entries) {
    into.replaceChildren(...entries.map(([name, colour, figure, plain]) => html('span', {},
      html('i', { style: { background: plain ? colour : `var(--${colour})` } }), name,
      figure === undefined ? undefined : html('b', {}, figure))));
  }

  /** No more points than can be told apart. */
  function thin(points, most = 600) {
    const step = Math.ceil(points.length / most);
    return points.filter((_, at) => at % step === 0 || at === points.length - 1);
  }

  /** Light, dark, or as the system has it. */
  function theme(redraw) {
    const button = byId('theme');
    const kinds = ['auto', 'light', 'dark'];
    const stored = () => {
      try { return localStorage.getItem('samepage-theme'); } catch { return null; }
    };
    let now = kinds.includes(stored()) ? stored() : 'auto';
    const apply = () => {
      if (now === 'auto') delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = now;
      button.textContent = 'Theme: ' + now;
    };
    button.addEventListener('click', () => {
      now = kinds[(kinds.indexOf(now) + 1) % kinds.length];
      try { localStorage.setItem('samepage-theme', now); } catch { /* It lasts as long as the page. */ }
      apply();
      redraw();
    });
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
    apply();
  }

  samepage.Page = Page;

  // A report contains its frames.
  const data = byId('data');
  if (data) {
    const { title, where, frames, state, maps } = JSON.parse(data.textContent);
    const page = new Page({ ended: true });
    frames.forEach((frame) => page.add(frame));
    page.frame = state;
    const seconds = frames.length > 1 ? frames[frames.length - 1].time - frames[0].time : 0;
    const when = frames.length > 0 ? new Date(frames[0].time * 1000).toLocaleString() : '';
    document.title = title;
    byId('where').textContent = where;
    byId('status').textContent = `${when}, ${duration(seconds)}`;
    page.draw();
    Object.entries(maps || {}).forEach(([name, map]) => page.map(name, map.cells));
    if (Object.keys(maps || {}).length === 0) byId('maps-panel').hidden = true;
    else page.drawMaps();
    document.body.dataset.ready = 'true';
  }
})();
