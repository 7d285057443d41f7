import { describe, expect, it } from 'vitest';
import { renderMarkdown, safeHref, sanitize } from './markdown';

const html = (text: string) => renderMarkdown(text).join('\n');

function dom(markup: string): HTMLElement {
  const element = document.createElement('div');
  element.innerHTML = markup;
  return element;
}

const SAFE_TAGS =
  'A P BR HR H1 H2 H3 H4 H5 H6 STRONG EM DEL CODE PRE BLOCKQUOTE UL OL LI DIV SPAN BUTTON TABLE THEAD TBODY TR TH TD'.split(
    ' ',
  );

/** Nothing that runs, loads, submits or restyles, judged on the parsed result and not on the text. */
function expectHarmless(markup: string): void {
  for (const element of dom(markup).querySelectorAll('*')) {
    expect(SAFE_TAGS).toContain(element.tagName);
    for (const { name, value } of element.attributes) {
      expect(['href', 'class', 'type', 'start', 'rel', 'target']).toContain(name);
      if (name === 'href') expect(value).toMatch(/^(https?|mailto):/);
    }
  }
}

const ATTACKS = [
  '<script>alert(1)</script>',
  '<img src=x onerror=alert(1)>',
  '<svg onload=alert(1)>',
  '<svg><style><img src=x onerror=alert(1)></style></svg>',
  '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
  '<iframe src="javascript:alert(1)"></iframe>',
  '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
  '<form action="https://evil.example"><input name=password><button>go</button></form>',
  '<a href="javascript:alert(1)">x</a>',
  '<base href="https://evil.example/">',
  '<meta http-equiv=refresh content="0;url=https://evil.example">',
  '<link rel=stylesheet href=https://evil.example/x.css>',
  '<style>body{display:none}</style>',
  '<div style="position:fixed;inset:0" id=app class=button onclick=alert(1)>x</div>',
  '<video><source onerror="alert(1)"></video>',
  '<details open ontoggle=alert(1)>x</details>',
  '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
  '<!--><img src=x onerror=alert(1)>-->',
  '<x-y contenteditable autofocus onfocus=alert(1)>',
  '[x](javascript:alert(1))',
  '[x](JaVaScRiPt:alert(1))',
  '[x](  javascript:alert(1))',
  '[x](java\tscript:alert(1))',
  '[x](&#106;avascript:alert(1))',
  '[x](javascript&colon;alert(1))',
  '[x](vbscript:msgbox(1))',
  '[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)',
  '[x](file:///etc/passwd)',
  '[x](blob:https://evil.example/1)',
  '[x](//evil.example)',
  '[x](/api/conversations)',
  '[x](https://ok.example "t\\" onmouseover=alert(1) x=\\"")',
  '[x](https://ok.example/"onmouseover=alert(1)//)',
  '![x](https://evil.example/track.png)',
  '![x](data:image/svg+xml;base64,PHN2Zy8+)',
  '![x"onerror="alert(1)](x)',
  '<javascript:alert(1)>',
  '```"><script>alert(1)</script>\ncode\n```',
  '```html\n<script>alert(1)</script>\n```',
  '`<script>alert(1)</script>`',
  '| <img src=x onerror=alert(1)> |\n|--|\n| <script>alert(1)</script> |',
  '[ref]: javascript:alert(1)\n\n[ref]',
  '# <img src=x onerror=alert(1)>',
  '- [x] <input type=checkbox onclick=alert(1)>',
  '\u0000<scr\u0000ipt>alert(1)</script>',
];

describe('renderMarkdown', () => {
  it.each(ATTACKS)('renders %j harmless', (attack) => {
    expectHarmless(html(attack));
    expectHarmless(html(`before ${attack} after`));
    // Every prefix is shown while the answer streams in.
    for (let end = 1; end < attack.length; end++) expectHarmless(html(attack.slice(0, end)));
  });

  it('shows raw HTML as the text that it is', () => {
    expect(dom(html('a <b>bold</b> word')).textContent).toContain('a <b>bold</b> word');
    expect(dom(html('<div>block</div>')).textContent).toContain('<div>block</div>');
  });

  it('opens links outside, without telling where they were clicked', () => {
    const link = dom(html('[docs](https://example.org/a?b=1&c=2)')).querySelector('a');
    expect(link?.getAttribute('href')).toBe('https://example.org/a?b=1&c=2');
    expect(link?.getAttribute('rel')).toBe('noopener noreferrer nofollow');
    expect(link?.getAttribute('target')).toBe('_blank');
  });

  it('makes an image a link, so that nothing is fetched', () => {
    const page = dom(html('![a cat](https://example.org/cat.png)'));
    expect(page.querySelector('img')).toBeNull();
    expect(page.querySelector('a')?.textContent).toBe('a cat');
  });

  it('labels code, colours what it knows, and keeps the code as it was', () => {
    const page = dom(html('```python title\nprint("<b>")\n```'));
    expect(page.querySelector('.code-head span')?.textContent).toBe('python');
    expect(page.querySelector('button.code-copy')?.getAttribute('type')).toBe('button');
    expect(page.querySelector('.hljs-string')?.textContent).toBe('"<b>"');
    expect(page.querySelector('code')?.textContent.trimEnd()).toBe('print("<b>")');
    expect(dom(html('```\nx < y\n```')).querySelector('code')?.textContent.trimEnd()).toBe('x < y');
  });

  it('renders tables, lists, line breaks and emphasis', () => {
    const page = dom(html('one\ntwo\n\n- **b**\n\n|a|b|\n|--|:-:|\n|1|2|'));
    expect(page.querySelector('p br')).not.toBeNull();
    expect(page.querySelector('li strong')?.textContent).toBe('b');
    expect(page.querySelector('td.align-center')?.textContent).toBe('2');
  });

  it('leaves earlier blocks untouched while the last one grows', () => {
    const before = renderMarkdown('first\n\nsec');
    const after = renderMarkdown('first\n\nsecond **b');
    expect(after[0]).toBe(before[0]);
    expect(after).toHaveLength(2);
  });
});

describe('sanitize, the second wall alone', () => {
  it.each(ATTACKS.filter((attack) => attack.startsWith('<')))('takes the harm out of %j', (attack) => {
    expectHarmless(sanitize(attack));
  });
});

describe('safeHref', () => {
  it('lets web and mail addresses through and nothing else', () => {
    expect(safeHref('https://例子.example/路')).toMatch(/^https:/);
    expect(safeHref('mailto:a@example.org')).toBe('mailto:a@example.org');
    for (const href of ['javascript:1', ' javascript:1', 'data:,x', 'ftp://x', '/x', 'x', '', '//x'])
      expect(safeHref(href)).toBeNull();
  });
});
