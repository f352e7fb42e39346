/**
 * Watches the streams of an aurora-bus daemon from a web page: without holes and without duplicates, through restarts,
 * broken networks and expiring tokens. Needs nothing else. What is told and asked for is described in aurora-bus.d.ts.
 *
 *     import { connect } from "https://bus.example/client/aurora-bus.js";
 *     connect({ snapshot: 50, onEvent: ({ data }) => console.log(data.title) });
 */

// In ms. Waiting begins anew with the shortest after HEALTHY_AFTER of being connected.
const FIRST_WAIT = 500;
const LONGEST_WAIT = 20_000;
const HEALTHY_AFTER = 30_000;
const WELCOME_WITHIN = 10_000;
const TOKEN_WITHIN = 30_000;
const PROBE_WITHIN = 5_000;
/** The most alerts that an iteration holds for its loop. */
const HELD = 1_000;

/** @param {import("./aurora-bus.d.ts").Options} [options] */
export const connect = (options) => new AuroraBus(options);

export class AuroraBus extends EventTarget {
  /** @type {import("./aurora-bus.d.ts").State} */
  state = "paused";
  #options;
  #url;
  #filter;
  /** By stream, the last position that was handed on. */
  #positions = new Map();
  /** By stream, the positions of what was handed on before its turn, which has not come. */
  #early = new Map();
  /** By stream, its subscription on this connection. */
  #streams = new Map();
  /** By id, who waits for the answer to a request. */
  #requests = new Map();
  #ids = 0;
  #socket;
  #attempts = 0;
  /** Counts up with every beginning and end, so that whoever waited in between knows. */
  #turn = 0;
  /** Until the next attempt, or while connected the next look for a sign of life. */
  #timer;
  /** Whether the daemon has told how long to wait. */
  #isTold = false;
  #saving;
  #ping = 25_000;
  #heardAt = 0;
  #welcomeAt;
  /** Whether a token is asked for that is newer than the last one, and whether it was on this attempt. */
  #renew = false;
  #renewed = false;
  /** Whether positions were given up. */
  #isAnew = false;
  /** What was told with the last change of the state. */
  #why;
  #listening = new AbortController();

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
    const on = (type, handle) => globalThis.addEventListener?.(type, handle, { signal: this.#listening.signal });
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

  /** Where it stands in all streams, as a text that `since` takes. */
  get position() {
    return [...this.#positions.values()].join(",");
  }

  /** Goes on from the last positions after `pause`, or after it has stopped. */
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
    this.#become("paused");
  }

  /** Disconnects for good. Nothing is told after that. */
  close() {
    if (this.state === "closed") return;
    this.#disconnect();
    this.#listening.abort();
    this.#save();
    this.#become("closed");
  }

  /**
   * Lets something else pass from now on, or everything. Fails, and changes nothing, where the daemon refuses it.
   * @param {import("./aurora-bus.d.ts").Filter} [filter]
   */
  async filter(filter) {
    const before = this.#filter;
    this.#filter = filter;
    const replace = (stream) => this.#request({ op: "filter", stream, filter });
    try {
      await Promise.all([...this.#streams.keys()].map(replace));
    } catch (error) {
      // Without a code the connection was lost: the next one begins with the new filter.
      if (error.code === undefined) return;
      if (this.#filter === filter) this.#filter = before;
      throw error;
    }
  }

  /** Forgets its positions, and begins anew with the snapshot. */
  reload() {
    this.#reset();
    for (const stream of [...this.#streams.keys()]) {
      this.#send({ op: "unsubscribe", stream });
      this.#subscribe(stream);
    }
  }

  /** What is received, in a loop that may be slow: it is disconnected, and goes on from there, if it falls behind. */
  async *[Symbol.asyncIterator]() {
    const held = [];
    let wake = () => {};
    let isFull = false;
    const look = () => wake();
    const hold = ({ detail }) => {
      if (held.push(detail) >= HELD && !isFull) {
        isFull = true;
        this.pause();
      }
      wake();
    };
    this.addEventListener("event", hold);
    this.addEventListener("state", look);
    try {
      for (;;) {
        while (held.length) yield held.shift();
        if (this.state === "closed") return;
        if (this.state === "stopped") throw Object.assign(new Error(this.#why.reason), this.#why);
        if (isFull) {
          isFull = false;
          this.resume();
        }
        await new Promise((resolve) => (wake = resolve));
      }
    } finally {
      this.removeEventListener("event", hold);
      this.removeEventListener("state", look);
    }
  }

  async #open() {
    clearTimeout(this.#timer);
    const turn = ++this.#turn;
    const isOvertaken = () => turn !== this.#turn;
    this.#renewed = this.#renew;
    this.#become("connecting");
    if (isOvertaken()) return;
    let token, ticket;
    try {
      const { token: ofToken, ticket: ofTicket } = this.#options;
      [token, ticket] = await within(TOKEN_WITHIN, Promise.all([this.#ask(ofToken), this.#ask(ofTicket)]));
    } catch (error) {
      if (!isOvertaken()) this.#lose({ reason: `no token: ${error?.message ?? error}` });
      return;
    }
    if (isOvertaken()) return;
    const url = new URL(this.#url);
    if (ticket) url.searchParams.set("ticket", ticket);
    let socket;
    try {
      socket = new WebSocket(url, token ? ["aurora.v1", `bearer.${token}`] : ["aurora.v1"]);
    } catch (error) {
      // Not the message: it has the token in it.
      return this.#stop({ reason: `the URL or the token can't be used: ${error.name}` });
    }
    socket.onmessage = ({ data }) => this.#hear(data);
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    this.#socket = socket;
    this.#timer = setTimeout(() => this.#lose({ reason: "no answer" }), WELCOME_WITHIN);
  }

  /** What an option says, or whoever is named there. */
  async #ask(source) {
    return typeof source === "function" ? source({ renew: this.#renew }) : source;
  }

  #closed(code, reason) {
    const { token, ticket } = this.#options;
    const isAsked = typeof token === "function" || typeof ticket === "function";
    if (code === 4003 || (code === 4501 && isAsked && !this.#renewed)) this.#renew = true;
    else if (code >= 4500 && code < 5000) return this.#stop({ code, reason });
    const turn = this.#turn;
    if (code === 4002) this.#reset();
    // Whoever was told may have ended it.
    if (turn !== this.#turn) return;
    const seconds = code === 4005 ? (/(\d+) ?s\b/.exec(reason)?.[1] ?? 10) : undefined;
    this.#lose({ code, reason }, seconds && 1000 * seconds + Math.random() * FIRST_WAIT);
  }

  /** The connection is gone, or given up: tries again, after `wait` ms where the daemon has told how long. */
  #lose(why, wait) {
    if (performance.now() - this.#welcomeAt > HEALTHY_AFTER) this.#attempts = 0;
    this.#isTold = wait !== undefined;
    wait ??= Math.random() * Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#attempts++);
    this.#disconnect();
    this.#timer = setTimeout(() => this.#open(), wait);
    this.#become("waiting", { ...why, wait });
  }

  #stop(why) {
    this.#disconnect();
    this.#become("stopped", why);
  }

  #disconnect() {
    this.#turn++;
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = this.#welcomeAt = undefined;
    if (socket) {
      // What is still on its way comes again.
      socket.onmessage = socket.onclose = null;
      socket.close(1000);
    }
    this.#streams.clear();
    const requests = [...this.#requests.values()];
    this.#requests.clear();
    for (const { reject } of requests) reject(new Error("disconnected"));
  }

  #hear(text) {
    this.#heardAt = performance.now();
    const frame = JSON.parse(text);
    const subscription = this.#streams.get(frame.s ?? frame.stream);
    // What comes of a subscription before it is confirmed is of the one that it replaces.
    const isOurs = subscription?.isBegun;
    switch (frame.t) {
      case "welcome":
        return this.#begin(frame);
      case "subscribed":
        if (subscription?.id !== frame.id) return;
        subscription.isBegun = true;
        this.#requests.delete(frame.id);
        if (!isSameLife(this.#positions.get(frame.stream), frame.from)) this.#advance(frame.stream, frame.from);
        return;
      case "event":
        return isOurs && this.#take(frame.s, frame.p, frame);
      case "mark":
        if (isOurs && isAfter(frame.p, this.#positions.get(frame.s))) this.#advance(frame.s, frame.p);
        return;
      case "gap": {
        const { s: stream, after, before, reason } = frame;
        return isOurs && this.#tell("gap", { stream, after, before, reason });
      }
      case "live":
        if (!isOurs) return;
        subscription.isLive = true;
        this.#tell("live", { stream: frame.s });
        if (this.#socket && [...this.#streams.values()].every(({ isLive }) => isLive)) this.#become("live");
        return;
      case "expiring":
        return this.#renewToken();
      case "drain":
        // It is the daemon that closes, so that not everybody comes back at once.
        clearTimeout(this.#timer);
        this.#timer = setTimeout(() => this.#lose({ reason: "drain" }), frame.after_ms + PROBE_WITHIN);
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

  #begin(welcome) {
    this.#welcomeAt = this.#heardAt;
    this.#ping = 1000 * Math.max(1, welcome.ping);
    this.#renew = false;
    for (const stream of this.#options.streams ?? welcome.streams) this.#subscribe(stream);
    this.#rest();
    this.#become("catching-up");
  }

  #subscribe(stream) {
    const { since, snapshot, mode, lane, strict } = this.#options;
    const known = this.#positions.get(stream);
    const first = this.#isAnew ? (snapshot ? undefined : "earliest") : since;
    const begin = { since: known ?? first, snapshot, filter: this.#filter };
    const id = ++this.#ids;
    this.#streams.set(stream, { id });
    const answer = this.#request({ op: "subscribe", stream, ...begin, mode, lane, strict }, id);
    answer.catch(({ code, message, frame }) => {
      if (frame?.retry) this.#lose({ code, reason: message }, frame.after_ms);
      else if (frame) this.#stop({ code, reason: message });
    });
  }

  /** Hands an alert on, unless it was before. */
  #take(stream, position, { d, x, lane }) {
    if (!this.#socket || !isAfter(position, this.#positions.get(stream))) return;
    const early = this.#early.get(stream) ?? new Set();
    const isKnown = early.has(position);
    if (lane) this.#early.set(stream, early.add(position));
    else this.#advance(stream, position);
    if (!isKnown) this.#tell("event", { stream, position, data: d, text: x, early: Boolean(lane) });
  }

  #advance(stream, position) {
    this.#positions.set(stream, position);
    const early = this.#early.get(stream) ?? [];
    for (const given of early) {
      if (isSameLife(given, position) && isAfter(given, position)) break;
      early.delete(given);
    }
    if (this.#options.remember) this.#saving ??= setTimeout(() => this.#save(), 1000);
  }

  #reset() {
    this.#positions.clear();
    this.#early.clear();
    this.#isAnew = true;
    this.#save();
    this.#tell("reset");
  }

  async #renewToken() {
    const { token } = this.#options;
    if (typeof token !== "function") return;
    const turn = this.#turn;
    try {
      const newer = await within(TOKEN_WITHIN, (async () => token({ renew: true }))());
      if (newer && turn === this.#turn) await this.#request({ op: "auth", token: newer });
    } catch {
      // The daemon closes with 4003 then, and the token is asked for again.
    }
  }

  /** Sends a request, and waits for its answer. */
  #request(request, id = ++this.#ids) {
    return new Promise((resolve, reject) => {
      this.#requests.set(id, { resolve, reject });
      this.#send({ ...request, id });
    });
  }

  #send(message) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(message));
  }

  /** Waits for silence, and asks then whether anybody is there. */
  #rest() {
    clearTimeout(this.#timer);
    const left = this.#heardAt + this.#ping - performance.now();
    this.#timer = setTimeout(() => (left > 0 ? this.#rest() : this.#probe(this.#ping)), Math.max(0, left));
  }

  /** Gives the connection up if nothing is heard in time. */
  #probe(ms = PROBE_WITHIN) {
    if (!this.#welcomeAt) return;
    clearTimeout(this.#timer);
    const askedAt = performance.now();
    this.#send({ op: "ping" });
    const judge = () => (this.#heardAt > askedAt ? this.#rest() : this.#lose({ reason: "silence" }));
    this.#timer = setTimeout(judge, ms);
  }

  /** The page is back, or the network. */
  #wake() {
    if (this.state === "waiting" && !this.#isTold) this.#open();
    else this.#probe();
  }

  #become(state, why) {
    this.state = state;
    this.#why = why;
    this.#tell("state", { state, ...why });
  }

  #tell(type, detail) {
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
      // No storage, or not ours: it begins as if it were the first time.
    }
  }

  #save() {
    clearTimeout(this.#saving);
    this.#saving = undefined;
    if (!this.#options.remember) return;
    try {
      sessionStorage.setItem(this.#key, JSON.stringify(Object.fromEntries(this.#positions)));
    } catch {
      // No storage, or no room: positions are in memory all the same.
    }
  }
}

/** Whether both positions are of the same life of their stream. */
const isSameLife = (one, other) => one?.split(":")[0] === other.split(":")[0];

/** Whether a position comes after another one of its stream. Between two lives of a stream there is no order. */
function isAfter(position, last) {
  if (!last || !isSameLife(position, last)) return true;
  const [, ms, seq] = position.split(/[:-]/);
  const [, lastMs, lastSeq] = last.split(/[:-]/);
  return ms === lastMs ? BigInt(seq) > BigInt(lastSeq) : Number(ms) > Number(lastMs);
}

/** The promise, or an error after so many ms. */
function within(ms, promise) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("took too long")), ms)));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
