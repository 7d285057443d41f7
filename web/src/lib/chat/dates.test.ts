import { describe, expect, it } from 'vitest';
import { dateGroup, groupByDate } from './dates';

const now = new Date(2026, 2, 10, 9, 30);
const at = (...parts: [number, number, number, number?, number?]) =>
  new Date(parts[0], parts[1], parts[2], parts[3] ?? 0, parts[4] ?? 0).getTime() / 1000;

describe('dateGroup', () => {
  it.each([
    ['today', at(2026, 2, 10, 0, 0)],
    ['today', at(2026, 2, 10, 9, 31)], // a server clock that runs ahead
    ['yesterday', at(2026, 2, 9, 23, 59)],
    ['yesterday', at(2026, 2, 9, 0, 0)],
    ['week', at(2026, 2, 8, 23, 59)],
    ['week', at(2026, 2, 3, 0, 0)],
    ['older', at(2026, 2, 2, 23, 59)],
  ])('puts calendar days under %s', (group, seconds) => {
    expect(dateGroup(seconds, now)).toBe(group);
  });
});

describe('groupByDate', () => {
  const conversation = (id: string, updated_at: number) => ({ id, title: id, created_at: 0, updated_at });

  it('sorts newest first and leaves empty groups out', () => {
    const groups = groupByDate(
      [
        conversation('old', at(2025, 0, 1)),
        conversation('early', at(2026, 2, 10, 7)),
        conversation('late', at(2026, 2, 10, 9)),
      ],
      now,
    );
    expect(groups.map(({ group, conversations }) => [group, conversations.map(({ id }) => id)])).toEqual([
      ['today', ['late', 'early']],
      ['older', ['old']],
    ]);
  });
});
