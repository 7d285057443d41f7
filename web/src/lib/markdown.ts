/**
 * The one place where a model's text becomes HTML. Two walls, each sufficient alone: Markdown is rendered by rules
 * that emit no raw HTML, no image and no odd link, and DOMPurify then lets through only the tags that those rules use.
 */
import DOMPurify from 'dompurify';
import { Marked, type Token, type Tokens } from 'marked';
import { highlight } from './highlight';

const ESCAPES: Record<string, string> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  "'": '&#39;',
};
const escape = (text: string) => text.replace(/[&<>"']/g, (character) => ESCAPES[character] ?? '');

/** The address if a reader may be sent there. Relative ones are refused: a model has no business inside our API. */
export function safeHref(href: string): string | null {
  try {
    const url = new URL(href);
    return ['http:', 'https:', 'mailto:'].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(href: string, html: string): string {
  const safe = safeHref(href);
  return safe ? `<a href="${escape(safe)}">${html}</a>` : html;
}

export interface CodeWords {
  copyCode: string;
  plainCode: string;
}

// Set for the length of one call of `renderMarkdown`, which is synchronous; the renderer has no other way to be told.
let words: CodeWords = { copyCode: 'Copy code', plainCode: 'code' };

const marked = new Marked({
  gfm: true,
  breaks: true, // small models end lines where they mean a new one
  renderer: {
    html: ({ text }: Tokens.HTML | Tokens.Tag) => escape(text),
    link({ href, tokens }: Tokens.Link) {
      return link(href, this.parser.parseInline(tokens));
    },
    // Fetching an image tells its host who reads what (and is a known way to leak a chat), so it stays a link.
    image: ({ href, text }: Tokens.Image) => link(href, escape(text || href)),
    checkbox: ({ checked }: Tokens.Checkbox) => (checked ? '☑ ' : '☐ '),
    code({ text, lang }: Tokens.Code) {
      const name = (lang ?? '').trim().split(/\s/)[0] ?? '';
      const body = highlight(text, name.toLowerCase()) ?? escape(text);
      return (
        `<div class="code"><div class="code-head"><span>${escape(name || words.plainCode)}</span>` +
        `<button type="button" class="code-copy">${escape(words.copyCode)}</button></div>` +
        `<pre><code>${body}\n</code></pre></div>`
      );
    },
    table(token: Tokens.Table) {
      const row = (tag: 'th' | 'td', cells: Tokens.TableCell[]) =>
        `<tr>${cells
          .map((cell) => {
            const align = cell.align ? ` class="align-${cell.align}"` : '';
            return `<${tag}${align}>${this.parser.parseInline(cell.tokens)}</${tag}>`;
          })
          .join('')}</tr>`;
      const body = token.rows.map((cells) => row('td', cells)).join('');
      // The wrapper scrolls sideways, so that a wide table never widens the page.
      return `<div class="table"><table><thead>${row('th', token.header)}</thead><tbody>${body}</tbody></table></div>`;
    },
  },
});

const TAGS =
  'a p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li div span button table thead tbody tr th td';

const purify = DOMPurify(window);
purify.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName !== 'A') return;
  const href = safeHref(node.getAttribute('href') ?? '');
  if (href === null) return node.removeAttribute('href');
  node.setAttribute('target', '_blank');
  node.setAttribute('rel', 'noopener noreferrer nofollow');
});

/** The second wall, public so that it can be attacked on its own. */
export const sanitize = (html: string): string =>
  purify.sanitize(html, {
    ALLOWED_TAGS: TAGS.split(' '),
    ALLOWED_ATTR: ['href', 'class', 'type', 'start'],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
  });

/**
 * Renders Markdown to safe HTML, one string for each top-level block. While an answer streams in, only its last block
 * changes, so the page keeps the others as they are, with whatever the reader has selected in them.
 */
export function renderMarkdown(text: string, codeWords: CodeWords = words): string[] {
  words = codeWords;
  const tokens: Token[] = marked.lexer(text);
  return tokens.map((token) => sanitize(marked.parser([token]))).filter((html) => html !== '');
}
