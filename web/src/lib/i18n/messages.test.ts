import { describe, expect, it } from 'vitest';
import { chooseLocale, MESSAGES } from './messages';

describe('chooseLocale', () => {
  it.each([
    [null, ['zh-CN', 'en'], 'zh'],
    [null, ['zh-Hant-TW'], 'zh'],
    [null, ['fr-FR', 'ZH', 'en'], 'zh'],
    [null, ['de', 'en-GB', 'zh'], 'en'],
    [null, ['fr'], 'en'],
    [null, [], 'en'],
    ['zh', ['en'], 'zh'],
    ['en', ['zh-CN'], 'en'],
    ['klingon', ['zh-CN'], 'zh'],
  ] as const)('stored %s, preferred %j -> %s', (stored, preferred, expected) => {
    expect(chooseLocale(stored, preferred)).toBe(expected);
  });
});

describe('MESSAGES', () => {
  // The type makes the keys equal; it cannot see an empty string or a word left untranslated.
  const han = /\p{Script=Han}/u;
  const speaksOfTheOther = new Set(['languageTag', 'otherLanguage', 'switchLanguage']);
  const words = (value: unknown): string[] => {
    if (typeof value === 'string') return [value];
    if (typeof value === 'function') return [String(value('x', 2))];
    return Object.values(value as object).flatMap(words);
  };

  it.each(Object.entries(MESSAGES.en).filter(([key]) => !speaksOfTheOther.has(key)))(
    '%s is English in English',
    (_, value) => {
      for (const word of words(value)) expect(word !== '' && !han.test(word)).toBe(true);
    },
  );

  it.each(Object.entries(MESSAGES.zh).filter(([key]) => !speaksOfTheOther.has(key)))(
    '%s is Chinese in Chinese',
    (_, value) => {
      for (const word of words(value)) expect(word).toMatch(han);
    },
  );
});
