/**
 * Watches the streams of an aurora-bus daemon from a web page, without gaps and duplicates, through restarts, broken
 * networks and expiring tokens. It has no dependencies. aurora-bus.d.ts describes options and events.
 *
 *     import { connect } from "https://bus.example/client/aurora-bus.js";
 *     connect({ snapshot: 50, onEvent: ({ data }) => console.log(data.title) });
 */

// In ms. After HEALTHY_AFTER of connection the pauses start with FIRST_WAIT again.
const FIRST_WAIT = 500;
const LONGEST_WAIT = 20_000;
const HEALTHY_AFTER = 30_000;
const WELCOME_WITHIN = 10_000;
const TOKEN_WITHIN = 30_000;
const PROBE_WITHIN = 5_000;
/** Limits the alerts that wait for an iterating loop. */
const MAX_BUFFERED = 1_000;

/** @param {import("./aurora-bus.d.ts").Options} [options] */
export const connect = (options) => new AuroraBus(options);

export class AuroraBus extends EventTarget {
  /** @type {import("./aurora-bus.d.ts").State} */
  state = "paused";
  #options;
  #url;
  #filter;
  /** The last delivered position of each stream. */
  #positions = new Map();
  /** The positions of early alerts of each stream that its position has not passed yet. */
  #early = new Map();
  /** The subscription of each stream on this connection. */
  #streams = new Map();
  /** The open requests, by id. */
  #requests = new Map();
  #ids = 0;
  #socket;
  #attempts = 0;
  /** Grows with each connect and disconnect, so that code after an `await` detects the change. */
  #generation = 0;
  /** Runs until the next connection or, while connected, until the next check for silence. */
  #timer;
  /** Whether the daemon set the pause. */
  #isWaitFixed = false;
  #saving;
  #ping = 25_000;
  #receivedAt = 0;
  #welcomedAt;
  /** Whether the next token must be newer than the last one, and whether that was so for this connection. */
  #renew = false;
  #renewed = false;
  /** Whether the positions were reset. */
  #isReset = false;
  /** The details of the last change of state. */
  #cause;
  #listeners = new AbortController();

  /** @param {import("./aurora-bus.d.ts").Options} [options] */
  constructor(options = {}) {
    super();
    this.#options = options;
    this.#filter = options.filter;
    this.#url = new URL(options.url ?? "/api/v1/ws/alerts", import.meta.url);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    for (const type of ["event", "gap", "live", "reset", "state"]) {
      const handle = options[`on${type[0].toUpperCase()}${type.slice(1)}`];
      if (handle) this.addEventListener(type, ({ detail }) => handle(detail));
    }
    const on = (type, handle) => globalThis.addEventListener?.(type, handle, { signal: this.#listeners.signal });
    on("online", () => this.#wake());
    on("pageshow", () => this.#wake());
    on("visibilitychange", () => globalThis.document?.visibilityState !== "hidden" && this.#wake());
    on("offline", () => this.#probe());
    if (options.remember) {
      this.#load();
      on("pagehide", () => this.#save());
    }
    this.resume();
  }

  /** The position in all streams, as a text for `since`. */
  get position() {
    return [...this.#positions.values()].join(",");
  }

  /** Connects again after `pause` or `stopped`, and resumes from the last positions. */
  resume() {
    if (this.state !== "paused" && this.state !== "stopped") return;
    this.#attempts = 0;
    this.#renew = false;
    this.#open();
  }

  /** Disconnects until `resume`. */
  pause() {
    if (this.state === "closed") return;
    this.#disconnect();
    this.#setState("paused");
  }

  /** Disconnects for good. No events follow. */
  close() {
    if (this.state === "closed") return;
    this.#disconnect();
    this.#listeners.abort();
    this.#save();
    this.#setState("closed");
  }

  /**
   * Replaces the filter; without an argument all alerts match. Rejects and changes nothing if the daemon refuses it.
   * @param {import("./aurora-bus.d.ts").Filter} [filter]
   */
  async filter(filter) {
    const before = this.#filter;
    this.#filter = filter;
    const replace = (stream) => this.#request({ op: "filter", stream, filter });
    try {
      await Promise.all([...this.#streams.keys()].map(replace));
    } catch (error) {
      // No code: the connection was lost, and the next one uses the new filter.
      if (error.code === undefined) return;
      if (this.#filter === filter) this.#filter = before;
      throw error;
    }
  }

  /** Forgets the positions and starts again with the snapshot. */
  reload() {
    this.#reset();
    for (const stream of [...this.#streams.keys()]) {
      this.#send({ op: "unsubscribe", stream });
      this.#subscribe(stream);
    }
  }

  /** Iterates over the alerts. If the loop is too slow, the connection pauses and then resumes. */
  async *[Symbol.asyncIterator]() {
    const buffer = [];
    let wake = () => {};
    let isFull = false;
    const check = () => wake();
    const push = ({ detail }) => {
      if (buffer.push(detail) >= MAX_BUFFERED && !isFull) {
        isFull = true;
        this.pause();
      }
      wake();
    };
    this.addEventListener("event", push);
    this.addEventListener("state", check);
    try {
      for (;;) {
        while (buffer.length) yield buffer.shift();
        if (this.state === "closed") return;
        if (this.state === "stopped") throw Object.assign(new Error(this.#cause.reason), this.#cause);
        if (isFull) {
          isFull = false;
          this.resume();
        }
        await new Promise((resolve) => (wake = resolve));
      }
    } finally {
      this.removeEventListener("event", push);
      this.removeEventListener("state", check);
    }
  }

  async #open() {
    clearTimeout(this.#timer);
    const generation = ++this.#generation;
    const isStale = () => generation !== this.#generation;
    this.#renewed = this.#renew;
    this.#setState("connecting");
    if (isStale()) return;
    let token, ticket;
    try {
      const { token: ofToken, ticket: ofTicket } = this.#options;
      [token, ticket] = await within(TOKEN_WITHIN, Promise.all([this.#provide(ofToken), this.#provide(ofTicket)]));
    } catch (error) {
      if (!isStale()) this.#reconnect({ reason: `no token: ${error?.message ?? error}` });
      return;
    }
    if (isStale()) return;
    const url = new URL(this.#url);
    if (ticket) url.searchParams.set("ticket", ticket);
    let socket;
    try {
      socket = new WebSocket(url, token ? ["aurora.v1", `bearer.${token}`] : ["aurora.v1"]);
    } catch (error) {
      // The message contains the token, so it is left out.
      return this.#stop({ reason: `the URL or the token is not valid: ${error.name}` });
    }
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#onClose(code, reason);
    this.#socket = socket;
    this.#timer = setTimeout(() => this.#reconnect({ reason: "no response" }), WELCOME_WITHIN);
  }

  /** Returns the value of an option, or the result of its function. */
  async #provide(source) {
    return typeof source === "function" ? source({ renew: this.#renew }) : source;
  }

  #onClose(code, reason) {
    const { token, ticket } = this.#options;
    const canRenew = typeof token === "function" || typeof ticket === "function";
    if (code === 4003 || (code === 4501 && canRenew && !this.#renewed)) this.#renew = true;
    else if (code >= 4500 && code < 5000) return this.#stop({ code, reason });
    const generation = this.#generation;
    if (code === 4002) this.#reset();
    // A listener of `reset` may have disconnected.
    if (generation !== this.#generation) return;
    const seconds = code === 4005 ? (/(\d+) ?s\b/.exec(reason)?.[1] ?? 10) : undefined;
    this.#reconnect({ code, reason }, seconds && 1000 * seconds + Math.random() * FIRST_WAIT);
  }

  /** Drops the connection and connects again after `wait` ms, or after a random pause. */
  #reconnect(cause, wait) {
    if (performance.now() - this.#welcomedAt > HEALTHY_AFTER) this.#attempts = 0;
    this.#isWaitFixed = wait !== undefined;
    wait ??= Math.random() * Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#attempts++);
    this.#disconnect();
    this.#timer = setTimeout(() => this.#open(), wait);
    this.#setState("waiting", { ...cause, wait });
  }

  #stop(cause) {
    this.#disconnect();
    this.#setState("stopped", cause);
  }

  #disconnect() {
    this.#generation++;
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = this.#welcomedAt = undefined;
    if (socket) {
      // Frames in transit are dropped: the next connection receives them again.
      socket.onmessage = socket.onclose = null;
      socket.close(1000);
    }
    this.#streams.clear();
    const requests = [...this.#requests.values()];
    this.#requests.clear();
    for (const { reject } of requests) reject(new Error("disconnected"));
  }

  #receive(text) {
    this.#receivedAt = performance.now();
    const frame = JSON.parse(text);
    const subscription = this.#streams.get(frame.s ?? frame.stream);
    // Frames before the confirmation belong to the subscription that this one replaces.
    const isOurs = subscription?.isConfirmed;
    switch (frame.t) {
      case "welcome":
        return this.#onWelcome(frame);
      case "subscribed":
        if (subscription?.id !== frame.id) return;
        subscription.isConfirmed = true;
        this.#requests.delete(frame.id);
        if (!isSameEpoch(this.#positions.get(frame.stream), frame.from)) this.#advance(frame.stream, frame.from);
        return;
      case "event":
        return isOurs && this.#deliver(frame.s, frame.p, frame);
      case "mark":
        if (isOurs && isAfter(frame.p, this.#positions.get(frame.s))) this.#advance(frame.s, frame.p);
        return;
      case "gap": {
        const { s: stream, after, before, reason } = frame;
        return isOurs && this.#emit("gap", { stream, after, before, reason });
      }
      case "live":
        if (!isOurs) return;
        subscription.isLive = true;
        this.#emit("live", { stream: frame.s });
        if (this.#socket && [...this.#streams.values()].every(({ isLive }) => isLive)) this.#setState("live");
        return;
      case "expiring":
        return this.#renewToken();
      case "drain":
        // The daemon closes the connection, so that clients do not all return at the same time.
        clearTimeout(this.#timer);
        this.#timer = setTimeout(() => this.#reconnect({ reason: "drain" }), frame.after_ms + PROBE_WITHIN);
        return;
      case "ok":
      case "error": {
        const request = this.#requests.get(frame.id);
        this.#requests.delete(frame.id);
        if (frame.t === "ok") return request?.resolve(frame);
        return request?.reject(Object.assign(new Error(frame.msg), { code: frame.code, frame }));
      }
    }
  }

  #onWelcome(welcome) {
    this.#welcomedAt = this.#receivedAt;
    this.#ping = 1000 * Math.max(1, welcome.ping);
    this.#renew = false;
    for (const stream of this.#options.streams ?? welcome.streams) this.#subscribe(stream);
    this.#watchSilence();
    this.#setState("catching-up");
  }

  #subscribe(stream) {
    const { since, snapshot, mode, lane, strict } = this.#options;
    const known = this.#positions.get(stream);
    const first = this.#isReset ? (snapshot ? undefined : "earliest") : since;
    const start = { since: known ?? first, snapshot, filter: this.#filter };
    const id = ++this.#ids;
    this.#streams.set(stream, { id });
    const response = this.#request({ op: "subscribe", stream, ...start, mode, lane, strict }, id);
    response.catch(({ code, message, frame }) => {
      if (frame?.retry) this.#reconnect({ code, reason: message }, frame.after_ms);
      else if (frame) this.#stop({ code, reason: message });
    });
  }

  /** Emits an alert, unless it was emitted before. */
  #deliver(stream, position, { d, x, lane }) {
    if (!this.#socket || !isAfter(position, this.#positions.get(stream))) return;
    const early = this.#early.get(stream) ?? new Set();
    const isRepeated = early.has(position);
    if (lane) this.#early.set(stream, early.add(position));
    else this.#advance(stream, position);
    if (!isRepeated) this.#emit("event", { stream, position, data: d, text: x, early: Boolean(lane) });
  }

  #advance(stream, position) {
    this.#positions.set(stream, position);
    const early = this.#early.get(stream) ?? [];
    for (const given of early) {
      if (isSameEpoch(given, position) && isAfter(given, position)) break;
      early.delete(given);
    }
    if (this.#options.remember) this.#saving ??= setTimeout(() => this.#save(), 1000);
  }

  #reset() {
    this.#positions.clear();
    this.#early.clear();
    this.#isReset = true;
    this.#save();
    this.#emit("reset");
  }

  async #renewToken() {
    const { token } = this.#options;
    if (typeof token !== "function") return;
    const generation = this.#generation;
    try {
      const newer = await within(TOKEN_WITHIN, (async () => token({ renew: true }))());
      if (newer && generation === this.#generation) await this.#request({ op: "auth", token: newer });
    } catch {
      // The daemon then closes with 4003, and the next connection requests a new token.
    }
  }

  /** Sends a request and waits for its response. */
  #request(request, id = ++this.#ids) {
    return new Promise((resolve, reject) => {
      this.#requests.set(id, { resolve, reject });
      this.#send({ ...request, id });
    });
  }

  #send(message) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(message));
  }

  /** Sends a ping after one ping interval of silence. */
  #watchSilence() {
    clearTimeout(this.#timer);
    const left = this.#receivedAt + this.#ping - performance.now();
    this.#timer = setTimeout(() => (left > 0 ? this.#watchSilence() : this.#probe(this.#ping)), Math.max(0, left));
  }

  /** Reconnects if no message comes in time. */
  #probe(ms = PROBE_WITHIN) {
    if (!this.#welcomedAt) return;
    clearTimeout(this.#timer);
    const sentAt = performance.now();
    this.#send({ op: "ping" });
    const check = () => (this.#receivedAt > sentAt ? this.#watchSilence() : this.#reconnect({ reason: "silence" }));
    this.#timer = setTimeout(check, ms);
  }

  /** Runs when the page or the network is back. */
  #wake() {
    if (this.state === "waiting" && !this.#isWaitFixed) this.#open();
    else this.#probe();
  }

  #setState(state, cause) {
    this.state = state;
    this.#cause = cause;
    this.#emit("state", { state, ...cause });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  get #key() {
    return `aurora-bus ${this.#options.remember}`;
  }

  #load() {
    try {
      const saved = Object.entries(JSON.parse(sessionStorage.getItem(this.#key)) ?? {});
      this.#positions = new Map(saved.filter(([, position]) => /^\w+:\d+-\d+$/.test(position)));
    } catch {
      // No storage, or foreign contents: start without positions.
    }
  }

  #save() {
    clearTimeout(this.#saving);
    this.#saving = undefined;
    if (!this.#options.remember) return;
    try {
      sessionStorage.setItem(this.#key, JSON.stringify(Object.fromEntries(this.#positions)));
    } catch {
      // No storage, or no space: the positions in memory remain.
    }
  }
}

/** Returns whether both positions have the same epoch. */
const isSameEpoch = (one, other) => one?.split(":")[0] === other.split(":")[0];

/** Returns whether a position is after another one of its stream. Between two epochs it is always true. */
function isAfter(position, last) {
  if (!last || !isSameEpoch(position, last)) return true;
  const [, ms, seq] = position.split(/[:-]/);
  const [, lastMs, lastSeq] = last.split(/[:-]/);
  return ms === lastMs ? BigInt(seq) > BigInt(lastSeq) : Number(ms) > Number(lastMs);
}

/** Resolves like the promise, or rejects after `ms`. */
function within(ms, promise) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("took too long")), ms)));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
