import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  plugins: [svelte()],
  build: {
    // Inside the Python package, so that the page travels in the wheel.
    outDir: '../gale/server/static',
    emptyOutDir: true,
    // Every browser we aim at preloads modules by itself.
    modulePreload: { polyfill: false },
    // The page is served under a policy that forbids data: scripts and fonts; keep every asset a file.
    assetsInlineLimit: 0,
    // The licences of what is bundled must travel with the bundle.
    license: { fileName: 'third-party-licenses.md' },
  },
  server: {
    // `npm run dev` shows the page against a `gale serve` running beside it.
    proxy: {
      '/api': {
        target: 'http://127.0.0.1:8000',
        changeOrigin: true,
        // To the server this page comes from another port, which it refuses as it would any foreign page.
        headers: { origin: 'http://127.0.0.1:8000', 'sec-fetch-site': 'same-origin' },
      },
    },
  },
  test: {
    environment: 'jsdom',
    include: ['src/**/*.test.ts'],
  },
});
