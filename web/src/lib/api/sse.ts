/**
 * Reads server-sent events from a fetch body, by the WHATWG "event stream interpretation" rules. The browser's own
 * `EventSource` cannot be used: it only sends GET and reconnects by itself, which would ask the model twice.
 */

export interface ServerSentEvent {
  name: string;
  data: string;
}

/** Turns text, cut anywhere, into events. Lines end with LF, CRLF or CR. */
export class EventStreamParser {
  #rest = '';
  #skipLineFeed = false;
  #name = '';
  #data: string[] = [];

  push(text: string): ServerSentEvent[] {
    // A CR that ended the last chunk has already ended its line; the LF of that same CRLF must not end another one.
    if (this.#skipLineFeed && text !== '') {
      if (text.startsWith('\n')) text = text.slice(1);
      this.#skipLineFeed = false;
    }
    const events: ServerSentEvent[] = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#skipLineFeed = text.endsWith('\r');
    this.#rest = lines.pop() ?? '';
    for (const line of lines) {
      const event = this.#line(line);
      if (event) events.push(event);
    }
    return events;
  }

  #line(line: string): ServerSentEvent | null {
    if (line === '') return this.#dispatch();
    const colon = line.indexOf(':');
    if (colon === 0) return null; // a comment, sent to keep the connection alive
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '');
    if (field === 'event') this.#name = value;
    else if (field === 'data') this.#data.push(value);
    return null;
  }

  #dispatch(): ServerSentEvent | null {
    const event = this.#data.length ? { name: this.#name || 'message', data: this.#data.join('\n') } : null;
    this.#name = '';
    this.#data = [];
    return event;
  }
}

/** Yields the events of `body`. An event cut off by the end of the stream is dropped, as the standard asks. */
export async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerSentEvent> {
  // One decoder for the whole stream holds back the bytes of a character that is split between chunks.
  const decoder = new TextDecoder();
  const parser = new EventStreamParser();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Leaving the loop early must free the connection; a body that has already failed has nothing to free.
    await reader.cancel().catch(() => {});
  }
}
