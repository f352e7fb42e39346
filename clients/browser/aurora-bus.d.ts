/** Connects to the daemon's alerts, and goes on until `close`. */
export declare function connect<T = unknown>(options?: Options<T>): AuroraBus<T>;

export interface Options<T = unknown> {
  /** The channel: `/api/v1/ws/alerts` of the daemon that the module comes from, unless this says otherwise. */
  url?: string | URL;
  /** Some of the channel's streams; all of them by default. */
  streams?: string[];
  /** Where to begin: positions (with commas between), an RFC 3339 time, `-15m`, or `earliest`; by default what is new. */
  since?: string;
  /** Begin with the newest so many (up to 1000) of each stream that pass. Not looked at where `since` is given. */
  snapshot?: number;
  /** What to see; everything by default. */
  filter?: Filter;
  /** `latest`: what a live page is too slow for is left out, and told as a gap. `lossless` by default. */
  mode?: "lossless" | "latest";
  /** `off`: critical alerts wait for their turn too. By default they come early to a page that is far behind. */
  lane?: "critical" | "off";
  /** Begin anew with the snapshot where something can't be given any more, instead of going on after the gap. */
  strict?: boolean;
  /**
   * A key or token, or who provides one. It is asked for each connection, and before a token expires; `renew` says that
   * the last one is no good any more. It has 30 s; where it fails, it is asked again a little later.
   */
  token?: Provided;
  /** A single-use ticket, or who provides one for each connection: what `POST /api/v1/ws/ticket` has answered. */
  ticket?: Provided;
  /** Keep the positions in `sessionStorage` under this name, so that the page goes on after it was loaded again. */
  remember?: string;
  /** The events of the same names, without their wrapping. */
  onEvent?(event: Received<T>): void;
  onGap?(gap: Gap): void;
  onLive?(live: { stream: string }): void;
  onReset?(): void;
  onState?(change: Change): void;
}

export type Provided =
  | string
  | undefined
  | ((why: { renew: boolean }) => string | undefined | Promise<string | undefined>);

/**
 * - `connecting`: on the way;
 * - `catching-up`: connected, and being told the past;
 * - `live`: what comes is new;
 * - `waiting`: the connection is lost, and tried again by itself;
 * - `paused`: until `resume`;
 * - `stopped`: the daemon would refuse it again; for people to see to, then `resume`;
 * - `closed`: for good.
 */
export type State = "connecting" | "catching-up" | "live" | "waiting" | "paused" | "stopped" | "closed";

export interface Change {
  state: State;
  /** Of `waiting` and `stopped`: the close code of the WebSocket or the code of an error, where there is one. */
  code?: number;
  /** Why, as the daemon or the module says it. */
  reason?: string;
  /** Of `waiting`: how long, in ms. */
  wait?: number;
}

export interface Received<T = unknown> {
  stream: string;
  /** Where it is in its stream. */
  position: string;
  /** What was published; nothing where that is no JSON. */
  data: T;
  /** What was published, where that is no JSON. */
  text?: string;
  /** Whether it came before its turn: older ones are still on their way. */
  early: boolean;
}

/** Something can't be given: between those positions, as far as they are known. */
export interface Gap {
  stream: string;
  after?: string;
  before?: string;
  reason: "trimmed" | "epoch" | "state_lost" | "unreadable" | "lossy" | (string & {});
}

/** A condition, or a tree of conditions: at most 4 levels and 32 nodes. */
export type Filter =
  | { op: "and" | "or" | "not"; nodes: Filter[] }
  | { key: Key; cmp: "eq" | "neq" | "prefix" | "contains" | "gte" | "lte"; val: string }
  | { key: Key; cmp: "in" | "nin"; vals: string[] }
  | { key: Key; cmp: "exists" };
export type Key = "severity" | "source" | "category" | "tenant" | "type" | "title" | "technique";

export interface Events<T = unknown> {
  /** An alert: each once, in the order of its stream, unless it is `early`. */
  event: CustomEvent<Received<T>>;
  gap: CustomEvent<Gap>;
  /** The past of a stream is told; what comes now is new. */
  live: CustomEvent<{ stream: string }>;
  /** Positions were given up: what was shown so far is shown again, as far as it is in the snapshot. */
  reset: CustomEvent<undefined>;
  state: CustomEvent<Change>;
}

/** What is received, as events, or in a loop: `for await (const { data } of connect())`. */
export declare class AuroraBus<T = unknown> extends EventTarget implements AsyncIterable<Received<T>> {
  constructor(options?: Options<T>);
  readonly state: State;
  /** Where it stands in all streams, as a text that `since` takes. */
  readonly position: string;
  /** Disconnects until `resume`. */
  pause(): void;
  /** Goes on from the last positions after `pause`, or after it has stopped. */
  resume(): void;
  /** Disconnects for good. Nothing is told after that. */
  close(): void;
  /** Replaces the filter in place; without one everything passes. Fails and changes nothing where the daemon refuses it. */
  filter(filter?: Filter): Promise<void>;
  /** Forgets the positions, and begins anew with the snapshot. */
  reload(): void;
  addEventListener<K extends keyof Events<T>>(
    type: K,
    listener: (event: Events<T>[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof Events<T>>(
    type: K,
    listener: (event: Events<T>[K]) => void,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | EventListenerOptions,
  ): void;
  /** In a loop that is slower than what comes, the connection is paused, and goes on from there. Ends with `close`. */
  [Symbol.asyncIterator](): AsyncGenerator<Received<T>, void, void>;
}
