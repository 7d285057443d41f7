import { describe, expect, it } from 'vitest';
import { takeToken, tokenIn } from './sign-in';

describe('tokenIn', () => {
  it.each([
    ['#sign-in=aB3_-x', 'aB3_-x'],
    ['', null],
    ['#', null],
    ['#sign-in=', null],
    ['#sign-in=a b', null],
    ['#sign-in=a&x=y', null],
    ['#other=a', null],
  ])('%s -> %s', (hash, token) => expect(tokenIn(hash)).toBe(token));
});

describe('takeToken', () => {
  it('leaves the address without it', () => {
    history.replaceState(null, '', '/c/x?y=1#sign-in=abc');
    expect(takeToken()).toBe('abc');
    expect(location.pathname + location.search + location.hash).toBe('/c/x?y=1');
    expect(takeToken()).toBeNull();
  });
});
