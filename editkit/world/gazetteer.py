"""Real places, currencies, languages, occupations, sports and instruments, written by hand.

One value was chosen where reality has several (one official language per country), so that each fact has one answer.
"""

# country: (continent, currency, language, cities with the capital first)
_ROWS = """
France|Europe|euro|French|Paris, Lyon, Marseille, Toulouse, Nantes
Germany|Europe|euro|German|Berlin, Hamburg, Munich, Cologne, Leipzig
Italy|Europe|euro|Italian|Rome, Milan, Naples, Turin, Bologna
Spain|Europe|euro|Spanish|Madrid, Barcelona, Valencia, Seville
Portugal|Europe|euro|Portuguese|Lisbon, Porto, Braga
Greece|Europe|euro|Greek|Athens, Patras
Finland|Europe|euro|Finnish|Helsinki, Tampere, Turku
Poland|Europe|zloty|Polish|Warsaw, Krakow, Gdansk, Poznan
Hungary|Europe|forint|Hungarian|Budapest, Szeged
Czechia|Europe|koruna|Czech|Prague, Brno, Ostrava
Sweden|Europe|krona|Swedish|Stockholm, Uppsala, Malmo
Norway|Europe|krone|Norwegian|Oslo, Bergen, Trondheim
Denmark|Europe|krone|Danish|Copenhagen, Aarhus, Odense
Iceland|Europe|krona|Icelandic|Reykjavik, Akureyri
Romania|Europe|leu|Romanian|Bucharest, Cluj
Bulgaria|Europe|lev|Bulgarian|Sofia, Plovdiv, Varna
Ukraine|Europe|hryvnia|Ukrainian|Kyiv, Lviv, Odesa
Turkey|Asia|lira|Turkish|Ankara, Istanbul, Izmir
Japan|Asia|yen|Japanese|Tokyo, Osaka, Kyoto, Nagoya
China|Asia|yuan|Mandarin|Beijing, Shanghai, Wuhan, Chengdu
Vietnam|Asia|dong|Vietnamese|Hanoi, Hue
Thailand|Asia|baht|Thai|Bangkok, Phuket
Indonesia|Asia|rupiah|Indonesian|Jakarta, Bandung, Medan
Malaysia|Asia|ringgit|Malay|Kuala Lumpur, Ipoh
India|Asia|rupee|Hindi|Delhi, Mumbai, Chennai, Pune
Nepal|Asia|rupee|Nepali|Kathmandu, Pokhara
Bangladesh|Asia|taka|Bengali|Dhaka, Khulna
Mongolia|Asia|tugrik|Mongolian|Ulaanbaatar
Israel|Asia|shekel|Hebrew|Jerusalem, Haifa
Jordan|Asia|dinar|Arabic|Amman, Aqaba
Georgia|Asia|lari|Georgian|Tbilisi, Batumi
Armenia|Asia|dram|Armenian|Yerevan, Gyumri
Egypt|Africa|pound|Arabic|Cairo, Alexandria, Luxor
Morocco|Africa|dirham|Arabic|Rabat, Casablanca, Fez
Kenya|Africa|shilling|Swahili|Nairobi, Mombasa
Ghana|Africa|cedi|English|Accra, Kumasi
Nigeria|Africa|naira|English|Abuja, Lagos, Kano
Ethiopia|Africa|birr|Amharic|Addis Ababa, Gondar
Zambia|Africa|kwacha|English|Lusaka, Ndola
Brazil|South America|real|Portuguese|Brasilia, Salvador, Recife, Manaus
Argentina|South America|peso|Spanish|Buenos Aires, Rosario, Mendoza
Peru|South America|sol|Spanish|Lima, Cusco, Arequipa
Paraguay|South America|guarani|Spanish|Asuncion, Encarnacion
Bolivia|South America|boliviano|Spanish|Sucre, La Paz
Mexico|North America|peso|Spanish|Mexico City, Puebla, Oaxaca
Guatemala|North America|quetzal|Spanish|Guatemala City, Antigua
Canada|North America|dollar|English|Ottawa, Toronto, Calgary, Halifax
Australia|Oceania|dollar|English|Canberra, Sydney, Perth, Hobart
New Zealand|Oceania|dollar|English|Wellington, Auckland, Dunedin
"""
COUNTRIES: dict[str, dict[str, str]] = {}
CITIES: dict[str, str] = {}
for _row in _ROWS.strip().splitlines():
    _name, _continent, _currency, _language, _cities = _row.split("|")
    _list = _cities.split(", ")
    COUNTRIES[_name] = {"continent": _continent, "currency": _currency, "language": _language, "capital": _list[0]}
    CITIES |= {city: _name for city in _list}

LANGUAGES = tuple(sorted({c["language"] for c in COUNTRIES.values()}))
OCCUPATIONS = tuple(
    "architect baker carpenter chemist surgeon lawyer painter sculptor gardener librarian pilot plumber teacher tailor "
    "watchmaker welder translator journalist geologist botanist dentist pharmacist photographer potter printer "
    "accountant actor astronomer barber beekeeper blacksmith bookbinder butcher cartographer cellist chef clockmaker "
    "composer dancer diplomat economist engineer farmer firefighter fisherman florist glazier goldsmith historian "
    "hotelier judge locksmith mathematician miner nurse optician philosopher physicist poet".split()
)
SPORTS = tuple(
    "tennis football hockey cricket rugby golf rowing fencing judo karate boxing wrestling archery badminton "
    "volleyball handball basketball baseball swimming diving cycling skiing skating curling sailing surfing climbing "
    "billiards squash polo".split()
)
INSTRUMENTS = tuple(
    "piano violin cello flute oboe clarinet bassoon trumpet trombone tuba horn harp guitar banjo mandolin lute viola "
    "organ accordion harmonica drums xylophone saxophone recorder zither sitar bagpipes ukulele harpsichord "
    "marimba".split()
)
INDUSTRIES = tuple(
    "shipping banking insurance textiles steel farming mining software brewing publishing furniture pharmacy "
    "aviation railways telecoms ceramics optics robotics".split()
)
