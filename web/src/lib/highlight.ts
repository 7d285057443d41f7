/** Syntax colours for the languages that are asked for most; each further one costs every reader a kilobyte or two. */
import hljs from 'highlight.js/lib/core';
import bash from 'highlight.js/lib/languages/bash';
import javascript from 'highlight.js/lib/languages/javascript';
import json from 'highlight.js/lib/languages/json';
import python from 'highlight.js/lib/languages/python';
import xml from 'highlight.js/lib/languages/xml';

const LANGUAGES = { bash, javascript, json, python, xml };
for (const [name, definition] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, definition);
// Close enough that the words which matter are coloured.
hljs.registerAliases(['ts', 'typescript'], { languageName: 'javascript' });

/** The code as HTML with `hljs-*` classes, everything in it escaped; null where the language is not known. */
export function highlight(code: string, languageName: string): string | null {
  if (!hljs.getLanguage(languageName)) return null;
  return hljs.highlight(code, { language: languageName, ignoreIllegals: true }).value;
}
