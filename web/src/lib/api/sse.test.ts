import { describe, expect, it, vi } from 'vitest';
import { EventStreamParser, readEvents, type ServerSentEvent } from './sse';

const TEXT = ': hello\n\nevent: delta\ndata: {"text":"风 🌬️"}\n\nevent: done\ndata: a\ndata: b\n\n';
const EXPECTED = [
  { name: 'delta', data: '{"text":"风 🌬️"}' },
  { name: 'done', data: 'a\nb' },
];

function parse(...chunks: string[]): ServerSentEvent[] {
  const parser = new EventStreamParser();
  return chunks.flatMap((chunk) => parser.push(chunk));
}

async function collect(body: ReadableStream<Uint8Array>): Promise<ServerSentEvent[]> {
  const events: ServerSentEvent[] = [];
  for await (const event of readEvents(body)) events.push(event);
  return events;
}

function bodyOf(bytes: Uint8Array, size: number): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.subarray(at, at + size));
      controller.close();
    },
  });
}

describe('EventStreamParser', () => {
  it.each([
    ['LF', '\n'],
    ['CRLF', '\r\n'],
    ['CR', '\r'],
  ])('gives the same events wherever the text is cut, with lines ended by %s', (_, end) => {
    const text = TEXT.replaceAll('\n', end);
    for (let at = 0; at <= text.length; at++) {
      expect(parse(text.slice(0, at), text.slice(at), end)).toEqual(EXPECTED);
    }
    expect(parse(...text, end)).toEqual(EXPECTED);
  });

  it('takes at most one space off a value, and knows lines without a colon', () => {
    expect(parse('data:  x\n\ndata\n\n')).toEqual([
      { name: 'message', data: ' x' },
      { name: 'message', data: '' },
    ]);
  });

  it('forgets the name of an event that had no data', () => {
    expect(parse('event: delta\n\ndata: x\n\n')).toEqual([{ name: 'message', data: 'x' }]);
  });
});

describe('readEvents', () => {
  it.each([1, 2, 3, 5, 1000])('joins characters that are split between chunks of %i bytes', async (size) => {
    expect(await collect(bodyOf(new TextEncoder().encode(TEXT), size))).toEqual(EXPECTED);
  });

  it('drops an event that the end of the stream cut off', async () => {
    expect(await collect(bodyOf(new TextEncoder().encode('data: half'), 100))).toEqual([]);
  });

  it('frees the connection when its reader stops early', async () => {
    const cancel = vi.fn();
    const body = new ReadableStream<Uint8Array>({
      start: (controller) => controller.enqueue(new TextEncoder().encode(TEXT)),
      cancel,
    });
    for await (const event of readEvents(body)) {
      expect(event.name).toBe('delta');
      break;
    }
    expect(cancel).toHaveBeenCalledOnce();
  });
});
