"""Hand-written gazetteer: real countries, cities, languages, occupations, sports, instruments, industries.

Short, unambiguous names were preferred: no two cities share a name, no city is named like a country. Where a
country has several official languages, the one most widely used in government is given.
"""

from __future__ import annotations

# country: (continent, currency, official language, cities; the first city is the capital)
_COUNTRIES: dict[str, tuple[str, str, str, str]] = {
    "Argentina": ("South America", "Argentine peso", "Spanish", "Buenos Aires, Rosario, Mendoza"),
    "Australia": ("Oceania", "Australian dollar", "English", "Canberra, Sydney, Brisbane, Adelaide"),
    "Austria": ("Europe", "euro", "German", "Vienna, Graz, Salzburg"),
    "Bangladesh": ("Asia", "taka", "Bengali", "Dhaka, Chittagong, Sylhet"),
    "Brazil": ("South America", "real", "Portuguese", "Brasilia, Recife, Curitiba, Manaus"),
    "Bulgaria": ("Europe", "euro", "Bulgarian", "Sofia, Plovdiv, Varna"),
    "Cambodia": ("Asia", "riel", "Khmer", "Phnom Penh, Battambang"),
    "Canada": ("North America", "Canadian dollar", "English", "Ottawa, Calgary, Winnipeg, Montreal"),
    "Chile": ("South America", "Chilean peso", "Spanish", "Santiago, Antofagasta, Temuco"),
    "China": ("Asia", "yuan", "Mandarin", "Beijing, Chengdu, Nanjing, Wuhan"),
    "Colombia": ("South America", "Colombian peso", "Spanish", "Bogota, Medellin, Cali"),
    "Cuba": ("North America", "Cuban peso", "Spanish", "Havana, Camaguey"),
    "Czechia": ("Europe", "koruna", "Czech", "Prague, Brno, Ostrava"),
    "Denmark": ("Europe", "Danish krone", "Danish", "Copenhagen, Aarhus, Odense"),
    "Egypt": ("Africa", "Egyptian pound", "Arabic", "Cairo, Luxor, Aswan"),
    "Ethiopia": ("Africa", "birr", "Amharic", "Addis Ababa, Gondar"),
    "Fiji": ("Oceania", "Fijian dollar", "English", "Suva, Lautoka"),
    "Finland": ("Europe", "euro", "Finnish", "Helsinki, Tampere, Oulu"),
    "France": ("Europe", "euro", "French", "Paris, Lyon, Nantes, Toulouse"),
    "Georgia": ("Asia", "lari", "Georgian", "Tbilisi, Batumi"),
    "Germany": ("Europe", "euro", "German", "Berlin, Bremen, Leipzig, Cologne"),
    "Ghana": ("Africa", "cedi", "English", "Accra, Kumasi, Tamale"),
    "Greece": ("Europe", "euro", "Greek", "Athens, Patras, Larissa"),
    "Hungary": ("Europe", "forint", "Hungarian", "Budapest, Szeged, Pecs"),
    "Iceland": ("Europe", "Icelandic krona", "Icelandic", "Reykjavik, Akureyri"),
    "India": ("Asia", "Indian rupee", "Hindi", "New Delhi, Mumbai, Jaipur, Pune"),
    "Indonesia": ("Asia", "rupiah", "Indonesian", "Jakarta, Bandung, Surabaya"),
    "Iran": ("Asia", "rial", "Persian", "Tehran, Shiraz, Tabriz"),
    "Ireland": ("Europe", "euro", "English", "Dublin, Cork, Galway"),
    "Italy": ("Europe", "euro", "Italian", "Rome, Turin, Bologna, Palermo"),
    "Japan": ("Asia", "yen", "Japanese", "Tokyo, Osaka, Nagoya, Sapporo"),
    "Kenya": ("Africa", "Kenyan shilling", "Swahili", "Nairobi, Mombasa, Kisumu"),
    "Mexico": ("North America", "Mexican peso", "Spanish", "Mexico City, Oaxaca, Puebla"),
    "Mongolia": ("Asia", "tugrik", "Mongolian", "Ulaanbaatar, Erdenet"),
    "Morocco": ("Africa", "dirham", "Arabic", "Rabat, Marrakesh, Fez"),
    "Nepal": ("Asia", "Nepalese rupee", "Nepali", "Kathmandu, Pokhara"),
    "Netherlands": ("Europe", "euro", "Dutch", "Amsterdam, Utrecht, Rotterdam"),
    "New Zealand": ("Oceania", "New Zealand dollar", "English", "Wellington, Auckland, Dunedin"),
    "Nigeria": ("Africa", "naira", "English", "Abuja, Lagos, Ibadan"),
    "Norway": ("Europe", "Norwegian krone", "Norwegian", "Oslo, Bergen, Trondheim"),
    "Peru": ("South America", "sol", "Spanish", "Lima, Cusco, Arequipa"),
    "Poland": ("Europe", "zloty", "Polish", "Warsaw, Krakow, Gdansk"),
    "Portugal": ("Europe", "euro", "Portuguese", "Lisbon, Porto, Braga"),
    "Romania": ("Europe", "leu", "Romanian", "Bucharest, Timisoara, Brasov"),
    "Senegal": ("Africa", "CFA franc", "French", "Dakar, Thies"),
    "South Korea": ("Asia", "won", "Korean", "Seoul, Busan, Daegu"),
    "Spain": ("Europe", "euro", "Spanish", "Madrid, Seville, Bilbao, Zaragoza"),
    "Sweden": ("Europe", "Swedish krona", "Swedish", "Stockholm, Malmo, Uppsala"),
    "Switzerland": ("Europe", "Swiss franc", "German", "Bern, Zurich, Geneva"),
    "Thailand": ("Asia", "baht", "Thai", "Bangkok, Phuket, Chiang Mai"),
    "Turkey": ("Asia", "lira", "Turkish", "Ankara, Izmir, Bursa"),
    "United Kingdom": ("Europe", "pound sterling", "English", "London, Leeds, Glasgow, Cardiff"),
    "United States": ("North America", "US dollar", "English", "Washington, Chicago, Boston, Seattle"),
    "Vietnam": ("Asia", "dong", "Vietnamese", "Hanoi, Danang, Hue"),
}

COUNTRIES: tuple[str, ...] = tuple(_COUNTRIES)
CONTINENT: dict[str, str] = {c: row[0] for c, row in _COUNTRIES.items()}
CURRENCY: dict[str, str] = {c: row[1] for c, row in _COUNTRIES.items()}
OFFICIAL_LANGUAGE: dict[str, str] = {c: row[2] for c, row in _COUNTRIES.items()}
COUNTRY: dict[str, str] = {city: c for c, row in _COUNTRIES.items() for city in row[3].split(", ")}
CITIES: tuple[str, ...] = tuple(COUNTRY)
CAPITAL: dict[str, str] = {c: row[3].split(", ")[0] for c, row in _COUNTRIES.items()}


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


LANGUAGES = _list("""Amharic, Arabic, Basque, Bengali, Bulgarian, Catalan, Czech, Danish, Dutch, English,
Estonian,
    Finnish, French, Georgian, German, Greek, Hebrew, Hindi, Hungarian, Icelandic, Indonesian, Irish, Italian,
    Japanese, Khmer, Korean, Mandarin, Mongolian, Nepali, Norwegian, Persian, Polish, Portuguese, Romanian,
    Spanish, Swahili, Swedish, Thai, Turkish, Vietnamese""")

OCCUPATIONS = _list("""accountant, actor, architect, astronomer, baker, barber, biologist, butcher, carpenter,
    chemist, composer, dentist, detective, diplomat, economist, editor, electrician, farmer, firefighter,
    florist, gardener, geologist, goldsmith, historian, journalist, judge, lawyer, librarian, linguist,
    mathematician, mechanic, midwife, nurse, optician, painter, pharmacist, photographer, physicist, pilot,
    plumber, poet, potter, sailor, sculptor, surgeon, tailor, teacher, translator, veterinarian, zoologist""")

SPORTS = _list("""archery, badminton, baseball, basketball, bowling, boxing, canoeing, chess, cricket,
curling,
    cycling, diving, fencing, football, golf, gymnastics, handball, hockey, judo, karate, polo, rowing, rugby,
    sailing, skating, skiing, squash, surfing, swimming, tennis, volleyball, wrestling""")

INSTRUMENTS = _list("""accordion, alphorn, bagpipes, banjo, bassoon, bugle, celesta, cello, clarinet, cornet,
    didgeridoo, double bass, drums, dulcimer, flute, glockenspiel, guitar, harmonica, harp, harpsichord, horn,
    lute, lyre, mandolin, marimba, oboe, organ, piano, piccolo, recorder, saxophone, sitar, trombone, trumpet,
    tuba, ukulele, viola, violin, xylophone, zither""")

INDUSTRIES = _list("""aviation, banking, brewing, construction, cosmetics, electronics, fashion, fishing,
forestry,
    furniture, insurance, logistics, mining, packaging, paper, publishing, railways, robotics, shipbuilding,
    software, steel, telecommunications, textiles, tourism""")
