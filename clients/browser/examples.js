import { connect } from "./aurora-bus.js";

const SHOWN = 200;
const LOGGED = 20;
// The same rules as the daemon's filter: by word, by OCSF number, by Suricata number.
const SEVERITIES = ["info", "low", "medium", "high", "critical"];
const SYNONYMS = { informational: "info", information: "info", fatal: "critical" };
const OCSF = new Map([...SEVERITIES, "critical"].map((severity, index) => [index + 1, severity]));
const SURICATA = new Map([[1, "critical"], [2, "high"], [3, "medium"], [4, "low"]]);

const element = (id) => document.getElementById(id);
const [alerts, log, state, access] = ["alerts", "log", "state", "access"].map(element);
let token;
let count = 0;
let sinceConnected = 0;

// Attackers can write alerts, so their contents are only set as text.
function make(name, text) {
  const made = document.createElement(name);
  made.textContent = text ?? "";
  return made;
}

function severityOf({ severity, severity_id: number, event_type: type, alert }) {
  const word = typeof severity === "string" ? severity.toLowerCase() : "";
  if (SEVERITIES.includes(word)) return word;
  if (Object.hasOwn(SYNONYMS, word)) return SYNONYMS[word];
  const ofSuricata = type === "alert" ? SURICATA.get(alert?.severity) : undefined;
  return OCSF.get(number) ?? ofSuricata ?? (word || "unknown");
}

/** Returns the severity, source and title of an alert in any known format. */
function view(data) {
  const alert = Object(data?.specversion ? data.data : data);
  const source = alert.source ?? alert.metadata?.product?.name ?? alert.event_type ?? alert.peer ?? data?.source;
  const title = alert.title ?? alert.finding_info?.title ?? alert.alert?.signature ?? alert.message ?? alert.note ?? alert.name;
  return { severity: severityOf(alert), source, title: title ?? "(no title)" };
}

function row(cells, name) {
  const made = document.createElement("tr");
  if (name) made.className = name;
  made.append(...cells);
  alerts.prepend(made);
  while (alerts.rows.length > SHOWN) alerts.lastElementChild.remove();
}

function show({ data, text, position, stream, early }) {
  const { severity, source, title } = view(data ?? { title: text });
  const time = new Date(Number(position.split(/[:-]/)[1])).toLocaleString();
  const level = make("td", severity);
  level.dataset.severity = severity;
  const details = document.createElement("details");
  details.append(make("summary", title));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    details.append(make("pre", data ? JSON.stringify(data, null, 2) : text), make("small", `${stream} ${position}`));
  });
  const cell = document.createElement("td");
  cell.append(details);
  row([make("td", early ? `${time}, early` : time), level, make("td", source), cell]);
  sinceConnected += 1;
  count += 1;
  element("count").textContent = count === 1 ? "1 alert" : `${count} alerts`;
}

function note(text) {
  element("last").textContent = text;
  log.prepend(make("li", `${new Date().toLocaleTimeString()} ${text}`));
  while (log.children.length > LOGGED) log.lastElementChild.remove();
}

function change({ state: now, code, reason, wait }) {
  state.dataset.state = now;
  const why = [code, reason].filter(Boolean).join(" ");
  const soon = wait === undefined ? "" : `connecting again in ${(wait / 1000).toFixed(1)} s`;
  state.textContent = [now, soon, why].filter(Boolean).join(": ");
  if (now === "catching-up") {
    sinceConnected = 0;
    note(bus.position ? `connected, resuming after ${bus.position}` : "connected");
  } else if (now === "live") note(`live, after ${sinceConnected} past alerts`);
  else if (why) note(state.textContent);
  // No code: the browser could not send the token.
  const isUnfit = now === "stopped" && code === undefined;
  const isRefused = isUnfit || (now === "stopped" && (code === 4501 || code === 4502));
  access.hidden = !isRefused;
  if (isRefused) {
    const why = isUnfit ? "This contains characters that are not valid in a key or token. Paste only the key or token." : reason;
    element("refusal").textContent = token ? why : "Credentials are required.";
    element("token").focus();
  }
}

const floor = () => element("severity").value;
const filter = () => (floor() ? { key: "severity", cmp: "gte", val: floor() } : undefined);

const bus = connect({
  snapshot: 50,
  filter: filter(),
  token: () => token,
});
bus.addEventListener("event", ({ detail }) => show(detail));
bus.addEventListener("state", ({ detail }) => change(detail));
bus.addEventListener("gap", ({ detail: { stream, reason } }) => {
  const cell = make("td", `Some alerts of ${stream} cannot be shown: ${reason}`);
  cell.colSpan = 4;
  row([cell], "gap");
});
bus.addEventListener("reset", () => {
  alerts.replaceChildren();
  count = 0;
});

element("severity").addEventListener("change", async () => {
  await bus.filter(filter());
  bus.reload();
});
element("pause").addEventListener("click", ({ target }) => {
  const isPaused = target.getAttribute("aria-pressed") !== "true";
  target.setAttribute("aria-pressed", String(isPaused));
  if (isPaused) bus.pause();
  else bus.resume();
});
access.addEventListener("submit", (submit) => {
  submit.preventDefault();
  token = element("token").value.trim().replace(/^bearer\s+/i, "");
  element("token").value = "";
  bus.resume();
});

for (const base of document.querySelectorAll(".base")) {
  base.textContent = location.origin.replace(/^http/, base.dataset.scheme ?? "http");
}
