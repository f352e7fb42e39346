/** Connects to the daemon and receives alerts until `close`. */
export declare function connect<T = unknown>(options?: Options<T>): AuroraBus<T>;

export interface Options<T = unknown> {
  /** The channel. Default: `/api/v1/ws/alerts` of the daemon that serves the module. */
  url?: string | URL;
  /** Some of the channel's streams. Default: all. */
  streams?: string[];
  /** The start: positions (separated by commas), an RFC 3339 time, `-15m`, or `earliest`. Default: only new alerts. */
  since?: string;
  /** Start with the newest matching alerts of each stream, up to 1000. Ignored if `since` is set. */
  snapshot?: number;
  /** The alerts to receive. Default: all. */
  filter?: Filter;
  /** `latest`: leaves out alerts if a live page is too slow, and reports a gap. Default: `lossless`. */
  mode?: "lossless" | "latest";
  /** `off`: critical alerts keep their order too. By default they come early to a page that is far behind. */
  lane?: "critical" | "off";
  /** Start again with the snapshot if entries cannot be delivered, instead of continuing after the gap. */
  strict?: boolean;
  /**
   * An API key or token, or a function that returns one. The function runs before each connection and before a token
   * expires. `renew` is true if the last token is no longer valid. It has 30 s; if it fails, it is called again a
   * little later.
   */
  token?: Provided;
  /** A single-use ticket from `POST /api/v1/ws/ticket`, or a function that returns one for each connection. */
  ticket?: Provided;
  /** Keeps the positions in `sessionStorage` under this name, so that a reloaded page resumes. */
  remember?: string;
  /** Handlers for the events of the same names. They receive the `detail` of the event. */
  onEvent?(event: Received<T>): void;
  onGap?(gap: Gap): void;
  onLive?(live: { stream: string }): void;
  onReset?(): void;
  onState?(change: Change): void;
}

export type Provided =
  | string
  | undefined
  | ((request: { renew: boolean }) => string | undefined | Promise<string | undefined>);

/**
 * - `connecting`: a connection is being opened;
 * - `catching-up`: connected, receiving past alerts;
 * - `live`: receiving new alerts;
 * - `waiting`: the connection is lost, the module will connect again;
 * - `paused`: disconnected until `resume`;
 * - `stopped`: the daemon would refuse the connection again. A person must fix the cause, then call `resume`;
 * - `closed`: disconnected for good.
 */
export type State = "connecting" | "catching-up" | "live" | "waiting" | "paused" | "stopped" | "closed";

export interface Change {
  state: State;
  /** For `waiting` and `stopped`: the close code of the WebSocket or the code of an error, if there is one. */
  code?: number;
  /** The reason, from the daemon or the module. */
  reason?: string;
  /** For `waiting`: the pause in ms. */
  wait?: number;
}

export interface Received<T = unknown> {
  stream: string;
  /** The position in the stream. */
  position: string;
  /** The payload. Undefined if it is not JSON. */
  data: T;
  /** The payload as a text if it is not JSON. */
  text?: string;
  /** Whether the alert came ahead of its order: older alerts follow. */
  early: boolean;
}

/** Entries between these positions (if known) that cannot be delivered. */
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
  /** An alert. Each comes once, in the order of its stream unless it is `early`. */
  event: CustomEvent<Received<T>>;
  gap: CustomEvent<Gap>;
  /** The past of a stream is complete; new alerts follow. */
  live: CustomEvent<{ stream: string }>;
  /** The positions were reset. Alerts of the new snapshot come again. */
  reset: CustomEvent<undefined>;
  state: CustomEvent<Change>;
}

/** Emits alerts as events, or in a loop: `for await (const { data } of connect())`. */
export declare class AuroraBus<T = unknown> extends EventTarget implements AsyncIterable<Received<T>> {
  constructor(options?: Options<T>);
  readonly state: State;
  /** The position in all streams, as a text for `since`. */
  readonly position: string;
  /** Disconnects until `resume`. */
  pause(): void;
  /** Connects again after `pause` or `stopped`, and resumes from the last positions. */
  resume(): void;
  /** Disconnects for good. No events follow. */
  close(): void;
  /** Replaces the filter; without an argument all alerts match. Rejects and changes nothing if the daemon refuses it. */
  filter(filter?: Filter): Promise<void>;
  /** Forgets the positions and starts again with the snapshot. */
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
  /** If the loop is too slow, the connection pauses and then resumes. Ends with `close`. */
  [Symbol.asyncIterator](): AsyncGenerator<Received<T>, void, void>;
}
