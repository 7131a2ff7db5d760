// The reader's choice of dark or light, before anything is painted; without one, the system's holds.
try { document.documentElement.style.colorScheme = localStorage.getItem("theme") || "light dark"; } catch { /* not kept */ }
