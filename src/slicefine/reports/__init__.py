"""One page that shows what runs did: self-contained HTML, no network, no scripts."""
