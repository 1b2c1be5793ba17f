'use strict';
// Polls the API once a second while the page is visible.
(function () {
  const byId = (id) => document.getElementById(id);
  /** Milliseconds from one answer to the next question. */
  const PAUSE = 1000;
  /** Maps that are asked for with each frame at most. */
  const MAPS = 6;

  let token = '';
  try { token = sessionStorage.getItem('samepage-token') || ''; } catch { /* It lasts as long as the page. */ }
  const given = new URLSearchParams(location.hash.slice(1)).get('token');
  if (given) {
    keep(given);
    history.replaceState(null, '', location.pathname);
  }

  function keep(value) {
    token = value;
    try { sessionStorage.setItem('samepage-token', value); } catch { /* as above */ }
  }

  class Refusal extends Error {
    constructor(status, problem) {
      super(problem.detail || `the server answers with status ${status}`);
      this.status = status;
      this.kind = problem.type;
    }
  }

  async function ask(path, options = {}) {
    const headers = { ...options.headers };
    if (token) headers.Authorization = 'Bearer ' + token;
    const response = await fetch(path, { ...options, headers, cache: 'no-store' });
    if (response.ok) return response.status === 204 ? null : response.json();
    throw new Refusal(response.status, await response.json().catch(() => ({})));
  }

  async function frame() {
    const [sharing, cache, pairs] = await Promise.all(
      ['/sharing', '/cache', '/sharing/pairs?limit=496'].map((path) => ask(path)));
    // Request the VMs last, so that their figures are from the sample that the other requests have caused.
    const vms = await ask('/vms');
    const asked = performance.now() / 1000;
    return {
      asked,
      time: sharing.time_seconds,
      enabled: sharing.enabled,
      guest: sharing.guest_bytes,
      resident: sharing.resident_bytes,
      private: sharing.private_bytes,
      saved: sharing.saved_bytes,
      engine: sharing.statistics,
      cache: {
        time: cache.time_seconds,
        cached: cache.cached_bytes,
        limit: cache.limit_bytes,
        in_guests: cache.in_guests_bytes,
        guests: cache.sources.guests_bytes,
        host: cache.sources.host_bytes,
        disk: cache.sources.disk_bytes,
      },
      vms: vms.map((vm) => ({
        name: vm.name,
        state: vm.state,
        reason: vm.reason,
        group: vm.group,
        memory: vm.memory_bytes,
        resident: vm.resident_bytes,
        saved: vm.saved_bytes,
        shared: vm.shared_bytes,
        private: vm.private_bytes,
        zero: vm.zero_bytes,
        wanted: vm.wanted_bytes,
        cpu_seconds: vm.cpu_seconds,
        io: vm.io && {
          guests: vm.io.from_guests_bytes,
          host: vm.io.from_host_bytes,
          disk: vm.io.from_disk_bytes,
        },
        asked,
      })),
      pairs: pairs.map((pair) => ({ vms: pair.vms, pages: pair.pages, error: pair.pages_error })),
    };
  }

  const page = new samepage.Page({ act: token ? act : undefined });

  function say(text, kind) {
    const status = byId('status');
    status.textContent = text;
    status.className = 'status ' + kind;
  }

  async function act(vm, action) {
    try {
      await ask(`/vms/${encodeURIComponent(vm)}/actions`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ action }),
      });
      clearTimeout(next);
      poll();
    } catch (error) {
      say(error.message, 'lost');
    }
  }

  /** Where the round of maps goes on. */
  let turn = 0;

  async function drawMaps() {
    const names = page.mapsInSight();
    const cells = names.length > 6 ? 1024 : 4096;
    const some = names.slice(0, MAPS).map((_, at) => names[(turn + at) % names.length]);
    turn = names.length > 0 ? (turn + some.length) % names.length : 0;
    await Promise.all(some.map(async (name) => {
      try {
        const map = await ask(`/vms/${encodeURIComponent(name)}/pages/map?cells=${cells}`);
        page.map(name, map.cells);
      } catch (error) {
        // The VM may have ended meanwhile. The next frame reports other errors.
        if (!(error instanceof Refusal)) throw error;
        // Some servers have no maps.
        if (error.kind === 'urn:samepage:problem:no-such-resource') byId('maps-panel').hidden = true;
      }
    }));
  }

  let next = 0;
  let polling = false;

  async function poll() {
    if (polling || document.hidden || byId('ask').open) return;
    polling = true;
    try {
      page.add(await frame());
      page.draw();
      await drawMaps();
      say('live', 'live');
      document.body.dataset.ready = 'true';
    } catch (error) {
      if (error.status === 401) askForToken(token ? 'This is not the token.' : '');
      else say(error instanceof Refusal ? error.message : 'no answer; trying again', 'lost');
    } finally {
      polling = false;
      next = setTimeout(poll, PAUSE);
    }
  }

  function askForToken(reason) {
    byId('ask-error').textContent = reason;
    byId('unlock').hidden = false;
    say('waits for the token', '');
    if (!byId('ask').open) byId('ask').showModal();
  }

  byId('unlock').addEventListener('click', () => askForToken(''));
  byId('ask').addEventListener('close', () => {
    const value = byId('token').value.trim();
    byId('token').value = '';
    if (value) {
      keep(value);
      page.act = act;
      byId('unlock').hidden = true;
    }
    clearTimeout(next);
    poll();
  });
  document.addEventListener('visibilitychange', () => {
    clearTimeout(next);
    poll();
  });

  byId('where').textContent = location.host + (token ? '' : ' · read-only');
  ask('/version').then(({ version, pid }) => {
    byId('where').textContent = `${location.host} · version ${version} · process ${pid}`;
  }).catch(() => {});
  poll();
})();
