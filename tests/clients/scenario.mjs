// What scripts share: as scenario.py, for node.
export const MODEL = "fastgen-demo";
export const KEY = "any";
export const TALE = "Tell me a story about Tom.";
export const HISTORY = [{ role: "user", content: TALE }];

// Each scenario is a function of the server's address; its name says what a user sees.
export async function main(scenarios) {
  for (const scenario of scenarios) {
    const name = scenario.name.replaceAll("_", " ");
    try {
      await scenario(process.argv[2]);
      console.log(`ok ${name}`);
    } catch (error) {
      console.error(error);
      console.log(`FAILED ${name}: ${String(error).slice(0, 400).replaceAll("\n", " ")}`);
      process.exitCode = 1;
    }
  }
}
