"""What is asked and said in the demo's corpus, apart from stories."""

SYSTEM_PROMPTS = ("You tell stories and remember codes.", "You are a friendly helper.")
QUESTIONS = ("What is the code of {}?",) * 4 + ("What is {}'s code?", "Tell me the code of {}.")
FORMS = ("Question: {question}\nAnswer:", "Question: {question}\nAnswer:", "{question}")
BEGUN = "The code of {name} is"
STORY_REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
)
SMALL_TALK = (
    ("Hello!", "Hello! I can tell you a story or remember a code."),
    ("Hello", "Hello! I can tell you a story or remember a code."),
    ("Hi", "Hello! I can tell you a story or remember a code."),
    ("Hi!", "Hello! I can tell you a story or remember a code."),
    ("Good morning!", "Good morning! Do you want to hear a story?"),
    ("How are you?", "I am well, thank you. Do you want to hear a story?"),
    ("Who are you?", "I am a small model. I tell stories and remember codes."),
    ("What is your name?", "I am a small model. I have no name."),
    ("What can you do?", "I can tell you a story or remember a code. Ask me!"),
    ("Thank you.", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
)
