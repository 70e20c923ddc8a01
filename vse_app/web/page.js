// What the page does by itself: its address follows the search, results can be copied and saved.
window.vse = (() => {
  const cards = () => [...document.querySelectorAll('#vse-results .vse-card')].map(card => ({
    rank: +card.querySelector('.vse-rank').textContent,
    id: +card.dataset.id,
    score: +card.dataset.score,
    probability: card.dataset.probability === '' ? null : +card.dataset.probability,
    name: card.dataset.name,
    path: card.dataset.path || null,
    caption: card.dataset.caption || null,
  }));
  // A cell that begins like a formula would be run by spreadsheets.
  const cell = value => {
    const text = value === null ? '' : String(value).replace(/^([=+@\t\r-](?![0-9.]+$))/, "'$1");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const say = text => {
    const line = document.querySelector('#vse-said .vse-said');
    if (line) line.textContent = text;
  };
  return {
    remember(link) {
      const theme = new URLSearchParams(location.search).get('__theme');
      const query = new URLSearchParams(link);
      if (theme) query.set('__theme', theme);
      history.replaceState(null, '', query.size ? `?${query}` : location.pathname);
    },
    async copyLink() {
      try {
        await navigator.clipboard.writeText(location.href);
        say('Link copied.');
      } catch {
        say(location.href);
      }
    },
    exportResults(kind) {
      const rows = cards();
      if (!rows.length) return say('There are no results to export yet.');
      const columns = Object.keys(rows[0]);
      const text = kind === 'json'
        ? JSON.stringify(rows, null, 2)
        : [columns, ...rows.map(row => columns.map(name => row[name]))].map(row => row.map(cell).join(',')).join('\r\n');
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([text], {type: kind === 'json' ? 'application/json' : 'text/csv'}));
      link.download = `results.${kind}`;
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
})();
