"""The kinds of things that the generated marketplace sells."""

from typing import NamedTuple

from dist_train.synthetic.sizes import Size


class Kind(NamedTuple):
    """A kind of product: its names and synonyms, how it looks and how it is measured."""

    family: str
    indonesian: tuple[str, ...]
    english: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[Size, ...]
    palette: str
    features: tuple[tuple[str, str], ...]


def _kind(family: str, names: str, shapes: str, sizes: str, palette: str, features: str) -> Kind:
    """Read one row of the table: "a|b = x|y" for names, "unit n n n" for sizes."""
    indonesian, english = (tuple(side.strip().split("|")) for side in names.split("="))
    unit, amounts = sizes.split(" ", 1)
    measured = [_amount(a) for a in amounts.split("," if unit == "phone" else " ")]
    pairs = [tuple(f.strip().split("/")) for f in features.split(",")]
    both = tuple((p[0], p[-1]) for p in pairs)
    sizes_of = tuple(Size(a, unit) for a in measured)
    return Kind(family, indonesian, english, tuple(shapes.split()), sizes_of, palette, both)


def _amount(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_PHONES = "phone Zenfo A12,Zenfo A13,Zenfo A52,Rivo Note 9,Rivo Note 10,Rivo 8 Pro,Ovi Y12,Ovi Y20"

KINDS = (
    _kind("beauty", "shampo|sampo|shampoo = shampoo|hair shampoo", "bottle pump",
          "ml 70 160 170 320 340 600", "scent",
          "anti ketombe/anti dandruff, rambut rontok/hair fall, rambut berminyak/oily hair, "
          "pelembut/smoothing, keratin, tanpa sls/sulfate free"),
    _kind("beauty", "sabun mandi|sabun cair|sabun = body wash|liquid soap", "pump bottle pouch",
          "ml 100 250 400 450 825 900", "scent",
          "pemutih badan/whitening, anti bakteri/antibacterial, lembut/gentle, scrub, "
          "antiseptik/antiseptic, kulit sensitif/sensitive skin"),
    _kind("beauty", "sabun muka|pembersih wajah|facial foam = face wash|facial wash", "tube bottle",
          "ml 50 60 100 120 150", "scent",
          "jerawat/acne, mencerahkan/brightening, kulit berminyak/oily skin, busa/foam, "
          "kontrol minyak/oil control, vitamin c"),
    _kind("beauty", "handbody|losion|hand body = body lotion|hand body lotion", "pump bottle tube",
          "ml 100 180 200 250 350 400", "scent",
          "pemutih/whitening, pelembab/moisturizing, spf 30, niacinamide, malam/night, "
          "kulit kering/dry skin"),
    _kind("beauty", "serum wajah|serum = face serum|serum", "dropper", "ml 10 15 20 30 50", "scent",
          "glowing, flek hitam/dark spot, niacinamide, retinol, jerawat/acne, anti aging"),
    _kind("beauty", "krim wajah|cream muka|krim siang = face cream|day cream", "jar tube",
          "g 10 12 15 20 30 50", "scent",
          "malam/night, pemutih/whitening, anti aging, glowing, bpom, spf 50"),
    _kind("beauty", "lipstik|lipstick matte|gincu = lipstick|lip cream", "lipstick",
          "g 2 3 4 5 7", "colour",
          "matte, tahan lama/long lasting, pelembab/moist, transferproof, velvet, waterproof"),
    _kind("beauty", "bedak|bedak padat|bedak tabur = face powder|compact powder", "compact",
          "g 10 12 15 20 25", "colour",
          "tahan lama/long wear, kontrol minyak/oil control, cerah/bright, halus/smooth, "
          "two way cake, natural"),
    _kind("beauty", "parfum|minyak wangi = perfume|eau de parfum", "spray box",
          "ml 10 30 35 50 60 100", "scent",
          "pria/for men, wanita/for women, tahan lama/long lasting, segar/fresh, manis/sweet, "
          "mewah/luxury"),
    _kind("food", "susu bubuk|susu = milk powder|powdered milk", "box pouch can",
          "g 200 350 400 780 800 1000", "flavour",
          "anak 1 plus/kids 1 plus, tinggi kalsium/high calcium, ibu hamil/maternity, "
          "penambah berat badan/weight gain, rendah lemak/low fat, dha"),
    _kind("food", "kopi bubuk|kopi = ground coffee|coffee powder", "pouch box jar",
          "g 65 100 165 200 250 500", "flavour",
          "arabika/arabica, robusta, tanpa ampas/instant, gayo, asli/pure, sangrai/roasted"),
    _kind("food", "teh celup|teh = tea bags|tea", "box pouch", "pcs 15 25 30 50 100", "flavour",
          "hijau/green, hitam/black, diet/slimming, melati/jasmine, herbal, premium"),
    _kind("food", "keripik singkong|keripik|kripik = cassava chips|chips", "pouch sachet",
          "g 60 68 100 180 200 250", "flavour",
          "renyah/crispy, level 5, tanpa msg/no msg, daun jeruk/lime leaf, tipis/thin, "
          "oleh oleh/souvenir"),
    _kind("food", "biskuit|kue kering|cookies = biscuit|cookies", "box can sachet",
          "g 80 110 120 137 300 350", "flavour",
          "krim/cream, gandum/wheat, mentega/butter, anak/kids, wafer, sandwich"),
    _kind("food", "mie instan|mi instant = instant noodle|noodles", "sachet cup",
          "g 65 70 75 85 120", "flavour",
          "goreng/fried, kuah/soup, ayam bawang/chicken onion, jumbo, korea/korean, "
          "kari/curry"),
    _kind("food", "madu murni|madu = pure honey|honey", "jar bottle", "ml 150 250 350 500 650",
          "flavour",
          "hutan/forest, asli/raw, randu/kapok, anak/kids, klanceng, pahit/bitter"),
    _kind("food", "beras|beras pulen = rice|premium rice", "sack pouch",
          "g 1000 2000 5000 10000 20000", "grain",
          "pulen/soft, pandan wangi/fragrant, merah/red, organik/organic, premium, "
          "diet/low sugar"),
    _kind("food", "bumbu dapur|bumbu masak|penyedap = seasoning|spice mix", "sachet jar",
          "g 20 30 45 50 100", "flavour",
          "rendang, nasi goreng/fried rice, tanpa msg/no msg, serbaguna/all purpose, "
          "bakar/barbecue, soto"),
    _kind("food", "susu uht|susu cair = uht milk|fresh milk", "gable bottle",
          "ml 115 125 200 250 1000",
          "flavour",
          "rendah lemak/low fat, full cream, anak/kids, steril/sterile, segar/fresh, "
          "tinggi protein/high protein"),
    _kind("baby", "popok bayi|pampers|popok = baby diapers|diapers", "pouch box",
          "pcs 20 28 30 34 40 44", "colour",
          "celana/pants, perekat/tape, ukuran besar/jumbo pack, kering/dry, malam/night, "
          "bayi baru lahir/newborn"),
    _kind("baby", "tisu basah|tissue basah = baby wipes|wet wipes", "pouch",
          "pcs 10 48 50 60 80", "scent",
          "tanpa alkohol/alcohol free, lembut/soft, tebal/thick, antiseptik/antiseptic, "
          "bayi/baby, tanpa parfum/fragrance free"),
    _kind("baby", "minyak telon|telon = telon oil|baby oil", "bottle", "ml 30 60 90 100 150",
          "scent",
          "anti nyamuk/mosquito repellent, hangat/warm, plus, bayi/baby, 8 jam/8 hours, "
          "alami/natural"),
    _kind("baby", "botol susu|dot bayi|botol dot = feeding bottle|baby bottle", "nipple",
          "ml 60 125 150 240 250 330", "colour",
          "anti kolik/anti colic, leher lebar/wide neck, bpa free, kaca/glass, "
          "pegangan/with handle, slow flow"),
    _kind("toys", "mobil mainan|mobil mobilan|mainan mobil = toy car|diecast", "car",
          "cm 8 12 16 20 30", "colour",
          "tarik mundur/pull back, remot/remote control, balap/racing, lampu/with light, "
          "diecast, anak laki/boys"),
    _kind("toys", "robot mainan|robot = toy robot|robot", "robot", "cm 12 15 18 25 30", "colour",
          "berubah/transforming, suara/with sound, baterai/battery, anak/kids, menari/dancing, "
          "edukasi/educational"),
    _kind("toys", "boneka beruang|boneka = teddy bear|plush doll", "plush",
          "cm 20 25 30 40 60 100", "colour",
          "lembut/soft, jumbo, pita/ribbon, wisuda/graduation, lucu/cute, kado/gift"),
    _kind("toys", "puzzle kayu|puzzle anak|puzzle = wooden puzzle|jigsaw", "box puzzle",
          "pcs 9 12 24 48 60 100", "colour",
          "hewan/animal, angka/number, huruf/alphabet, edukasi/educational, kayu/wooden, "
          "montessori"),
    _kind("fashion", "kaos|kaos polos|baju kaos = t shirt|tshirt", "shirt", "wear S M L XL XXL",
          "colour",
          "lengan pendek/short sleeve, katun combed/combed cotton, oversize, pria/men, "
          "sablon/printed, distro"),
    _kind("fashion", "jaket|jaket hoodie|hoodie = hoodie|jacket", "hoodie", "wear M L XL XXL",
          "colour",
          "zipper, tebal/thick, fleece, motor/rider, wanita/women, couple"),
    _kind("fashion", "sepatu|sepatu sneakers|sneakers = sneakers|shoes", "shoe",
          "shoe 37 38 39 40 41 42 43", "colour",
          "pria/men, wanita/women, lari/running, casual, sekolah/school, kanvas/canvas"),
    _kind("fashion", "sandal|sandal jepit = sandals|slippers", "sandal",
          "shoe 36 37 38 39 40 41 42", "colour",
          "karet/rubber, empuk/comfy, rumah/indoor, anti slip, wanita/women, gunung/outdoor"),
    _kind("fashion", "tas selempang|tas wanita|tas = sling bag|shoulder bag", "bag",
          "cm 18 20 24 28 32", "colour",
          "kulit/leather, mini, rantai/chain, kanvas/canvas, korea/korean, waterproof"),
    _kind("fashion", "tas ransel|ransel|tas sekolah = backpack|school bag", "backpack",
          "cm 30 35 40 45 50", "colour",
          "laptop, anti air/waterproof, usb, anak/kids, gunung/hiking, kerja/office"),
    _kind("fashion", "topi|topi baseball = baseball cap|hat", "cap", "cm 54 56 58 60", "colour",
          "bordir/embroidery, polos/plain, trucker, distro, pria/men, vintage"),
    _kind("fashion", "kaos kaki|kaoskaki = socks|ankle socks", "sock", "pcs 1 3 5 6 10 12",
          "colour",
          "pendek/short, panjang/long, sekolah/school, katun/cotton, motif/pattern, thumb/jempol"),
    _kind("fashion", "jam tangan|jam = wrist watch|watch", "watch", "mm 32 36 38 40 44", "colour",
          "pria/men, wanita/women, digital, kulit/leather strap, anti air/water resist, couple"),
    _kind("fashion", "hijab|kerudung|jilbab segi empat = hijab|scarf", "scarf",
          "cm 100 110 115 120",
          "colour",
          "segi empat/square, voal, pashmina, polos/plain, instan/instant, motif/printed"),
    _kind("gadget", "casing hp|case hp|softcase = phone case|soft case", "phone_case", _PHONES,
          "colour",
          "anti crack/shockproof, bening/clear, glitter, karakter/cartoon, kulit/leather, "
          "kamera/camera protect"),
    _kind("gadget", "kabel data|kabel charger|kabel = data cable|charging cable", "cable",
          "cm 25 100 150 200 300", "colour",
          "fast charging, type c, micro usb, nylon, 3 in 1, lightning"),
    _kind("gadget", "power bank|powerbank = power bank|portable charger", "power_bank",
          "mAh 5000 8000 10000 12000 20000", "colour",
          "fast charging, tipis/slim, dual usb, mini, led display, tenaga surya/solar"),
    _kind("gadget", "headset bluetooth|tws|earphone = wireless earbuds|tws earphone", "earbuds",
          "mAh 200 300 400 500", "colour",
          "bass, gaming, mic, noise cancelling, touch control, sport"),
    _kind("gadget", "flashdisk|flash disk|fd = flash drive|usb drive", "flashdisk",
          "GB 8 16 32 64 128", "colour",
          "usb 3.0/usb 3.0, otg, metal, mini, high speed, garansi/warranty"),
    _kind("gadget", "mouse|mouse wireless = wireless mouse|mouse", "mouse", "cm 8 9 10 12",
          "colour",
          "gaming, rgb, silent/silent click, kabel/wired, ergonomis/ergonomic, optical"),
    _kind("gadget", "speaker bluetooth|speaker = bluetooth speaker|speaker", "speaker",
          "W 3 5 8 10 20", "colour",
          "bass, karaoke, portable, radio fm, led, mini"),
    _kind("home", "lampu led|bohlam|lampu = led bulb|bulb", "bulb", "W 3 5 7 9 12 15 18", "colour",
          "hemat energi/energy saving, emergency, kuning/warm white, terang/super bright, "
          "garansi/warranty, putih/daylight"),
    _kind("home", "botol minum|tumbler|termos = water bottle|tumbler", "tumbler",
          "ml 350 500 600 750 1000 2000", "colour",
          "stainless, bpa free, tahan panas/insulated, sedotan/with straw, olahraga/sport, "
          "anak/kids"),
    _kind("home", "wajan|penggorengan|teflon = frying pan|non stick pan", "pan",
          "cm 16 18 20 24 26 28 30", "colour",
          "anti lengket/non stick, marble, tutup kaca/with lid, induksi/induction, "
          "keramik/ceramic, "
          "gagang kayu/wood handle"),
    _kind("home", "handuk|handuk mandi = bath towel|towel", "towel", "cm 50 70 100 120 140",
          "colour",
          "katun/cotton, microfiber, tebal/thick, hotel, bordir/embroidery, dewasa/adult"),
    _kind("home", "bantal sofa|bantal|sarung bantal = cushion|pillow", "cushion",
          "cm 30 40 45 50 60",
          "colour",
          "silikon/silicone fill, motif/printed, kursi/chair, lembut/soft, dakron/dacron, zipper"),
    _kind("home", "payung|payung lipat = umbrella|folding umbrella", "umbrella",
          "cm 55 60 75 95 100",
          "colour",
          "otomatis/automatic, anti uv, golf, mini, terbalik/reverse, motif/pattern"),
    _kind("home", "gelas mug|mug|gelas = mug|ceramic mug", "mug", "ml 200 250 300 330 400",
          "colour",
          "keramik/ceramic, tutup/with lid, custom, souvenir, lucu/cute, enamel"),
    _kind("home", "sabun cuci piring|pencuci piring = dish soap|dishwashing liquid", "bottle pouch",
          "ml 210 400 460 700 755 780", "scent",
          "anti bakteri/antibacterial, jumbo, hilangkan lemak/grease cutting, wangi/fragrant, "
          "refill, food grade"),
    _kind("home", "deterjen|deterjen bubuk|sabun cuci = detergent|washing powder", "pouch box sack",
          "g 250 450 700 770 800 1000 1800", "scent",
          "anti noda/stain remover, matic, pelembut/softener, konsentrat/concentrate, "
          "bunga/floral, higienis/hygienic"),
    _kind("home", "pewangi pakaian|pelembut pakaian|softener = fabric softener|softener",
          "pouch bottle", "ml 300 720 780 900 1600", "scent",
          "sekali bilas/one rinse, tahan lama/long lasting, anti apek/anti odor, premium, "
          "bayi/baby, uap setrika/ironing"),
    _kind("home", "buku tulis|buku catatan|notebook = notebook|notes", "notebook",
          "pcs 32 38 50 58 100", "colour",
          "garis/lined, polos/plain, spiral, hardcover, sekolah/school, aesthetic"),
)  # fmt: skip

FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS))
OF_FAMILY = {name: tuple(k for k in KINDS if k.family == name) for name in FAMILIES}
