// Light or dark as chosen here, before anything is painted; without a choice the system's own.
const chosen = localStorage.getItem("theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
