// A browser that does what it is told: one JSON request a line on stdin, one JSON answer a line on stdout.
// node bridge.mjs FOLDER_WITH_NODE_MODULES CHROMIUM
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [folder, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(`${folder}/package.json`)("playwright-core");
const browser = await chromium.launch({ executablePath, args: ["--headless", "--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1600, height: 1000 } });
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.setDefaultTimeout(30000);

const run = ([source, argument]) => [`(${source})(${JSON.stringify(argument ?? null)})`];
const commands = {
    goto: (url) => page.goto(url).then(() => null),
    evaluate: (...call) => page.evaluate(...run(call)),
    wait: (...call) => page.waitForFunction(...run(call)).then(() => null),
    click: (selector) => page.click(selector).then(() => null),
    clickAt: (x, y) => page.mouse.click(x, y).then(() => null),
    screenshot: (path, clip) => page.screenshot({ path, clip: clip ?? undefined }).then(() => null),
    errors: () => errors.splice(0),
};

for await (const line of createInterface({ input: process.stdin })) {
    const { command, args } = JSON.parse(line);
    let answer;
    try {
        answer = { value: (await commands[command](...args)) ?? null };
    } catch (error) {
        answer = { error: String(error) };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
