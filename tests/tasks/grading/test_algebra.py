"""Which answers are the same, with all of the grading but its processes: text, numbers, units, algebra."""

import pytest

from jaxrl_fp16.tasks.grading.algebra import open_verifier
from jaxrl_fp16.tasks.grading.answers import gold_answers, settle

# A line: what is gold, what is answered.
SAME = r"""
1/3 ; 0.333...
0.1\overline{6} ; 1/6
\frac{1}{6} ; 0.1666\ldots
0.\dot{3} ; 1/3
0.\dot{1}4285\dot{7} ; 1/7
1/7 ; 0.(142857)
\frac{4}{3} ; 1.\bar{3}
-\frac{1}{3} ; -0.\overline{3}
\frac{7}{3} ; 2\frac{1}{3}
\frac{7}{3} ; 2 1/3
2\frac13 ; 7/3
-\frac{5}{2} ; -2\frac{1}{2}
2.5 ; 2½
\frac52 ; 2 \frac{1}{2}
1\frac{4}{5} ; 1.8
1234567 ; 1 234 567
1234567 ; 1 234 567
10080 ; 10,\!080
1000 ; 1'000
90 ; 90^{\circ}
90^\circ ; 90 degrees
90^\circ ; 90°
25 ; 25°C
x^2+1 ; x²+1
x^{10} ; x¹⁰
\sqrt{2} ; √2
2\sqrt{3} ; 2√3
\pi/2 ; π/2
2\pi ; 2π
-3 ; −3
x\leq 3 ; x ≤ 3
72 ; $$72$$
72 ; \[ 72 \]
72 ; \[\boxed{72}\]
72 ; $\boxed{72}$.
73 ; **73**.
73 ; `73`
73 ; __73__
73 ; **Answer:** 73
73 ; The final answer is **73**
18 ; 18 dollars
18 ; $18
18 ; \$18
18 ; 18 dollars per day
18 dollars ; \$18
5\text{ cm} ; 5 cm
5\text{ cm} ; 5
5\text{ cm} ; 5 centimeters
5\text{ cm}^2 ; 5 square centimeters
5\text{ cm}^2 ; 5 cm²
9.8 ; 9.8 \text{ m/s}^2
9.8 \text{ m/s}^2 ; 9.8 m/s^2
60\text{ mph} ; 60 miles per hour
60\text{ km/h} ; 60 \frac{\text{km}}{\text{h}}
5 ; 5 m
5 ; 5\,\mathrm{m}
5 ; 5 \mathrm{~m}
50\% ; 50 percent
50\% ; 50
50\% ; 0.5
50 ; 50\%
0.5 ; 50\%
5000000 ; 5 million
5\text{ million} ; 5,000,000
3.2\text{ million} ; 3200000
24 ; 2 dozen
11_2 ; 3
11_2 ; 11
3 ; 11_2
1011_2 ; 1011_{two}
1A_{16} ; 26
2516_8 ; 2516
\text{(B)} ; B
\text{(B)} ; (B)
\text{(B)} ; \textbf{(B)}\ 15
\textbf{(B)}\ 15 ; B
\textbf{(B)}\ 15 ; 15
C ; C) 12
C ; C. 12
C ; (C)
C ; Option C
C ; \text{C}
15 ; \textbf{(B) } 15
x=5 ; 5
5 ; x=5
5 ; x = 5
5 ; f(2) = 5
5 ; x_1 = 5
(1,2) ; (x,y)=(1,2)
(-\infty,3) ; x<3
[2,3] ; 2\leq x\leq 3
x^2-1 ; (x-1)(x+1)
\frac{x}{2^{99}} ; \frac{2x}{2^{100}}
\frac{2}{\sqrt{2}} ; \sqrt{2}
\sqrt{2}+\sqrt{3} ; \sqrt{5+2\sqrt{6}}
y=2x+3 ; 2x-y+3=0
2x+4y=6 ; x+2y=3
\{1,2\} ; \{2,1\}
1,2 ; 2,1
\pm 2 ; -2, 2
\begin{pmatrix} 1/2 \\ 2 \end{pmatrix} ; \begin{pmatrix} 0.5 \\ 2 \end{pmatrix}
\pi ; 3.14159265
\frac{\pi}{4} ; 0.785398
\frac{\pi}{100} ; 0.0314159
\sin 30^\circ ; \sin 30^\circ
\text{Evelyn} ; evelyn
\text{not possible} ; Not possible
\text{even} ; even.
100! ; 100!
3 ; \log_2 8
1 ; \sin^2 x+\cos^2 x
2^{1000} ; 2\cdot 2^{999}
3+4i ; 4i+3
(1234, 5678) ; (1,234, 5,678)
x^{2000} ; x^{2,000}
7 ; So the answer is $\boxed{7}$
7 ; #### 7
12:30 ; 12:30
5:3 ; 5:3
8 ; 8 \text{ units}
8 \text{ square units} ; 8
8\text{ in} ; 8 inches
\frac{1}{2} ; 1/2 cup
6.02\times 10^{23} ; 6.02e23
1/\sqrt{2} ; \frac{\sqrt{2}}{2}
(0,1)\cup(2,3) ; (2,3)\cup(0,1)
\frac{3}{4} ; ¾
5 ; ５
(3,4) ; （3，4）
\infty ; ∞
[0,\infty) ; [0, ∞)
0 ; 0.0
p-q ; -q+p
\frac{\sqrt{3}}{2} ; 0.8660254
8 ; 2^3
\text{east} ; East
\left(\frac{1}{2},\frac{1}{3}\right) ; (1/2, 1/3)
5 ; 5.
5 ; \text{5}
3 ; \mathbf{3}
\$5 ; 5 dollars
\frac{1}{2} ; .5
\frac{1}{2^{99}} ; \frac{2}{2^{100}}
5 ; 5\text{ cm}
1011_2 ; 1011_{2}
1000 ; 1\,000
1234567 ; 1\,234\,567
1000 ; 1{,}000
\frac{1}{3} ; 0.\overline{3}
0.\overline{27} ; \frac{3}{11}
90 ; 90°
-5 ; –5
-5 ; −5
x^2 ; x²
72 ; \[72\]
72 ; \(72\)
18 ; 18,
18 ; 18 apples
C ; \textbf{(C) }12
B ; (B)
so \boxed{7}. ; 7
7 ; The answer is 7
x<3 ; (-\infty,3)
840 ; 840.
13 ; \text{13}
\sqrt{17} ; 4.123105625617661
73 ; **73**
\frac{1}{3} ; 0.\overline{333}
\frac{5}{11} ; .\overline{45}
12.5\% ; 12.5 percent
\frac{1}{8} ; 12.5\%
1,000,000 ; 1 000 000
3 ; 3.000
3\sqrt{2} ; 3√2
\frac{3\sqrt{2}}{2} ; (3√2)/2
x^3 ; x³
x^{-1} ; x⁻¹
x_1 ; x₁
\frac{1}{2} ; ½
5\frac{1}{4} ; 5 1/4
5\frac{1}{4} ; 21/4
5\frac{1}{4} ; 5.25
-1\frac{1}{2} ; -1.5
\text{Yes} ; yes
\text{Yes} ; Yes.
(A) ; A
\text{A} ; (A) 5
\mathrm{(C)} ; C
D ; \boxed{D}
D ; \textbf{(D)}\ 30\%
30\% ; \textbf{(D)}\ 30\%
(-\infty,-1)\cup(1,\infty) ; x<-1 or x>1
(-\infty,-1)\cup(1,\infty) ; x>1 \text{ or } x<-1
(-\infty,-1)\cup(1,\infty) ; (-\infty,-1) \text{ or } (1,\infty)
x<-1 or x>1 ; (-\infty,-1)\cup(1,\infty)
x<-1 or x>1 ; x>1 or x<-1
(-\infty,-1]\cup(1,\infty) ; x\le-1 \lor x>1
(-\infty,1)\cup[2,3) ; x<1 or 3>x\geq 2
(-\infty,\frac{1}{2})\cup(\sqrt{2},\infty) ; x<\frac12 or \sqrt 2<x
\{0\}\cup(2\pi,\infty) ; x=0 or x > 2 \pi
1,2 ; x=1, x=2
1,2 ; x = 1 \text{ and } x = 2
1,2 ; x_1=1, x_{2}=2
x=1 \text{ or } x=2 ; 1, 2
x=1, x=2 ; x=2 or 1
(1,2),(3,4) ; (x,y)=(1,2) \text{ or } (x,y)=(3,4)
1000,2 ; x=1,000, x=2
(-1,0)\cup[\frac12,\infty) ; x=(-1,0) \cup [\tfrac12, \infty)
9:24 ; x=9:24
4\!:\!51\!:\!06 \text{ p.m.} ; x=4:51:06 p.m.
10,\!080 ; 10 , \! 080
3/8 ; \dfrac 3\, 8
42 ; \begin{align*}x=42\end{align*}
11:30\text{ a.m.} ; 11:30 AM
5 p.m. ; 5 PM
\frac{3\pm\sqrt{5}}{2} ; x=\frac{3+\sqrt5}{2}, x=\frac{3-\sqrt5}{2}
2-\sqrt3, 2+\sqrt3 ; 2\pm\sqrt{3}
3+\sqrt5, 3-\sqrt5 ; x=3\pm\sqrt5
x=3\pm\sqrt5 ; x=3+\sqrt5 \text{ or } x=3-\sqrt5
x=3\pm\sqrt5 ; 3\pm\sqrt{5}
(1,3) ; x>1 and x<3
[1,3) ; x<3 \text{ and } 1\leq x
12 ; twelve
\text{twelve} ; 12
21 ; The answer is twenty-one.
-1234 ; minus one thousand two hundred and thirty-four
\frac{1}{3} ; 33\frac13\%
33\frac13\% ; 1/3
33\frac13\% ; \frac{100}{3}
33\frac{1}{3}\% ; 33 1/3 percent
7:1 ; 7 to 1
7:1 ; \frac{7}{1}
5/3 ; 5:3
(1,2) ; {(1,2)}
2007 + \frac\pi 2 ; {2007 + \frac\pi 2}
E ; E. None of the above
45^\circ ; 45 degrees
45 ; 45^{\circ}
60 ; 60°
\frac{\pi}{3} ; π/3
8 \text{ cm}^3 ; 8 cm^3
8 \text{ cm}^3 ; 8 cubic centimeters
8 ; 8 cm^3
8 ; 8 \text{ cm}^3
8 ; 8\ \text{cm}^{3}
50 ; 50 mph
50 ; 50 miles per hour
36 ; 36 \text{ square units}
36\pi ; 36\pi \text{ square units}
36\pi ; 36\pi\text{ cm}^2
36\pi ; 36π cm²
10 ; 10 minutes.
\$12.50 ; 12.50
12.5 ; \$12.50
1200 ; \$1,200
1200 ; \$1,200.00
1200 ; 1,200 dollars
6 ; 6 hours
6\text{ hours} ; 6 hr
0.5 ; \frac{1}{2}
2 ; \sqrt{4}
1+\sqrt{2} ; \sqrt{2}+1
\frac{-1+\sqrt{5}}{2} ; \frac{\sqrt{5}-1}{2}
x \in (1,2) ; (1,2)
(1,2) ; x \in (1,2)
(1,2) ; 1<x<2
[1,\infty) ; x \ge 1
1, 2, 3 ; 3, 2, 1
1,2 ; 1 \text{ and } 2
\{1,2\} ; 1,2
2 ; x = 2.
2 ; $x=2$
2 ; n = 2
y=x+1 ; y = 1+x
\frac{x+1}{2} ; \frac{1}{2}(x+1)
101_2 ; 5
101_2 ; 101_{2}
101_2 ; 101 (base 2)
FF_{16} ; 255
4210_{5} ; 4210_5
2^{10} ; 1024
10! ; 3628800
\frac{100!}{98!} ; 9900
\log 100 ; 2
\binom{10}{3} ; 120
\infty ; infinity
i ; i
2+3i ; 3i+2
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ; \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
6.022\times 10^{23} ; 6.022e23
1.6e-19 ; 1.6 \times 10^{-19}
3:5 ; 3:5
11:30 ; 11:30
7 ; Answer: 7
7 ; The answer is: $7$.
7 ; Final Answer: \boxed{7}
7 ; **7**
7 ; *7*
7 ; \text{The answer is } 7
7 ; = 7
7 ; 7!/6!
1.5 ; 1.50
-7 ; - 7
-7 ; -7.0
\emptyset ; ∅
\frac{1}{2}, \frac{1}{3} ; 1/3, 1/2
0.0001 ; 10^{-4}
\frac{9}{4} ; 2.25
14 ; 14 inches
$18$ ; 18
\pi ; π
12 ; 12 (cookies)
"""
DIFFERENT = r"""
\frac{x}{2^{99}} ; \frac{x}{2^{98}}
x+\frac{1}{2^{99}} ; x+\frac{1}{2^{98}}
(0,\frac{1}{2^{99}}) ; (0,\frac{1}{2^{98}})
\{1,\frac{1}{2^{99}}\} ; \{1,\frac{1}{2^{98}}\}
1-\frac{1}{2^{300}} ; 1-\frac{1}{2^{400}}
\sqrt{2}+2^{-90} ; \sqrt{2}+2^{-91}
\sqrt{2}+2^{-400} ; \sqrt{2}+2^{-401}
y=\frac{x}{2^{99}} ; y=\frac{x}{2^{98}}
x<\frac{1}{2^{99}} ; x<\frac{1}{2^{98}}
\begin{pmatrix} \frac{1}{2^{99}} \\ 2 \end{pmatrix} ; \begin{pmatrix} \frac{1}{2^{98}} \\ 2 \end{pmatrix}
10^{-30} ; 10^{-31}
\frac{\pi}{10^{20}} ; \frac{\pi}{10^{21}}
e^{-40} ; 0
\frac{1}{2^{99}} ; 0
\binom{100}{50} ; \binom{100}{49}
\frac{50!}{48!} ; \frac{50!}{47!}
3 kg ; 3 g
3 \text{ m} ; 3 \text{ km}
5\text{ cm}^2 ; 5\text{ cm}
5\text{ cm} ; 5\text{ cm}^2
5 hours ; 5 minutes
\$5 ; 5 cents
\$5 ; 5\%
90^\circ ; 90 radians
25°C ; 25°F
60 mph ; 60 km/h
5 apples ; 5 oranges
5t ; 5
5t ; 5h
2ab ; 2
2d ; 2
5 ; 5t
5 ; 5x
5x ; 5
50\% ; 0.5\%
50\% ; 5
5 ; 5 million
5 million ; 5 billion
5\text{ million} ; 5\text{ thousand}
11_2 ; 11_3
11_2 ; 10_2
1011_2 ; 13_8
11_2 ; 4
11_2 ; 12
1000000 ; 1000000.5
123456789 ; 123456788.9
5 ; 4.9999999
5 ; 5.0000001
4.9999999 ; 5
5 ; \sqrt{25.0000001}
5 ; 5+10^{-8}
B ; A, B
B ; A or B
B ; (A) or (B)
B ; (B) or (C)
\text{(B)} ; \textbf{(C)}\ 15
\textbf{(B)}\ 15 ; \textbf{(C)}\ 15
\textbf{(B)}\ 15 ; 16
B ; C) 12
0.\overline{3} ; 0.3
\frac{1}{3} ; 0.33
0.\overline{27} ; 0.\overline{72}
0.\overline{3} ; 3
\frac{7}{3} ; \frac{2}{3}
\frac{2}{3} ; 2\frac{1}{3}
1 ; 2 1/3
1/3 ; 2 1/3
12 ; 1 2
1234 ; 1, 234
\text{east} ; seat
east ; seat
(1,2) ; [1,2]
(1,2) ; (2,1)
3 ; x<3
x<3 ; x>3
x<3 ; x\leq 3
(-\infty,3) ; x\leq 3
(-\infty,3) ; x>3
x=5 ; y=5
-5 ; 5
\pm 2 ; 2
5 ; 2,3,5
1,2 ; 1
1 ; 1,2
x^2 ; x2
x^2 ; x^3
\sqrt{2} ; 1.414
\pi ; 3.14
\pi ; 22/7
100 ; 1\,00
3+4i ; 3-4i
8 ; 8!
2^{10} ; 210
10^5 ; 105
5 hours 30 minutes ; 5 hours
5 ; not 5
5 ; 6 or 5
12:30 ; 12:45
4:51 p.m. ; 4:51 a.m.
(0,1)\cup(2,3) ; (0,1)\cup(2,4)
\frac{1}{2} ; 12
2x=6 ; 2x=8
y=2x+3 ; y=2x+4
2x+3y=6 ; 2x+3y=7
x^2+y^2=1 ; x^2+y^2=2
\{1,2,3\} ; \{1,2\}
1.5 ; 15
.5 ; 5
0.001 ; 0.002
\frac{1}{10^{9}} ; \frac{1}{10^{10}}
2004! ; 2005!
\cos 1 ; \cos 1 + 10^{-20}
5 \text{ feet} ; 5 \text{ ft}^2
1'000 ; 1
7 ; 7a
x=\pm 1 ; x=1
n ; m
\text{yes} ; no
\sqrt{17} ; 4.1231
0.\overline{9} ; 0.9
\frac{1}{2^{99}} ; \frac{1}{2^{98}}
\frac{1}{2004!} ; \frac{1}{2006!}
\frac{2^{2005}+1}{3 \cdot 2^{2006}} ; \frac{1}{3 \cdot 2^{2006}}
\frac{100!}{99!\cdot 2} ; \frac{100!}{99!\cdot 4}
\frac{3^{1000}}{2^{1000}} ; \frac{3^{1000}}{2^{1001}}
1-\frac{1}{2^{60}} ; 1-\frac{1}{2^{70}}
\frac{1}{2^{99}} ; -\frac{1}{2^{99}}
e^{-40} ; e^{-50}
\frac{1}{2^{40}} ; \frac{1}{2^{41}}
5\text{ feet} ; 5\text{ inches}
3 \text{ days} ; 3 \text{ hours}
1 2 ; 12
0.\overline{3} ; 0.\overline{4}
n=2, 3, 4 ; n=1, 2, 3
D = (0, 1) ; D = (0, 1.5)
12:00 ; 1:00
\pm 2021 ; 2021
4 ; 4\sqrt(2)
3x-y+13=0 ; 3x+4y+14=0
12.5\% ; 1.25\%
\frac{5}{11} ; 0.\overline{54}
1,000,000 ; 1,000,001
5\frac{1}{4} ; \frac{5}{4}
5\frac{1}{4} ; 51/4
A ; B
(A) ; (B) 5
30\% ; \textbf{(D)}\ 35\%
E ; D. None of the above
8 \text{ cm}^3 ; 8 \text{ cm}^2
8\text{ m} ; 8\text{ cm}
50\text{ mph} ; 50\text{ km/h}
10 minutes ; 10 seconds
6\text{ hours} ; 6\text{ days}
\$12 ; 12\text{ cents}
€5 ; \$5
[1,\infty) ; x > 1
(1,2) ; 1\leq x\leq 2
(-\infty,-1)\cup(1,\infty) ; x<-1
101_2 ; 101_3
101_2 ; 6
FF_{16} ; 254
\frac{2^{2005}}{3^{2006}} ; \frac{2^{2006}}{3^{2006}}
\frac{1}{10^{50}} ; -\frac{1}{10^{50}}
3\cdot 10^{-20} ; 4\cdot 10^{-20}
10^{20}+1 ; 10^{20}
10^{100}+1 ; 10^{100}
\sqrt{10^{40}+1} ; 10^{20}
\pi^{-50} ; \pi^{-51}
\frac{\sqrt{2}}{10^{30}} ; \frac{\sqrt{3}}{10^{30}}
\sin 10^{-20} ; 0
2^{-100}x ; 2^{-101}x
x^{2}+2^{-100} ; x^{2}
\{2^{-100}\} ; \{2^{-101}\}
(2^{-100},1) ; (2^{-101},1)
[0,2^{-100}] ; [0,2^{-101}]
x=2^{-100} ; x=2^{-101}
5 ; x=2^{-100}+5
1000000 ; 999999.5
100 ; 99.99999
3 ; 3.0000001
7 ; 7\text{ or }8
7 ; 7, 8
7 ; 7 and 8
7 ; 77
7 ; -7
7 ; 7^2
7 ; 7x
7y ; 7
7 ; 0.7
1234567 ; 1\,234\,568
x ; y
\text{east} ; west
\text{Friday} ; Monday
\text{yes} ; \text{no}
(3,4) ; 3,5
1/3 ; 33\%
0.3 ; 0.\overline{3}
2 ; 2\frac{1}{2}
\frac{1}{2} ; 2\frac{1}{2}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ; \begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}
i ; 1
2+3i ; 2-3i
0 ; 10^{-30}
0 ; \frac{1}{2^{99}}
1 ; 1+2^{-99}
1 ; 0.\overline{98}
2 ; \sqrt{4+10^{-30}}
e^{-100} ; e^{-101}
\log(1+10^{-30}) ; 0
5 ; 5 mod 7
10\text{ apples} ; 10\text{ pears}
25\text{ m}^2 ; 25\text{ m}
3 \text{ dozen} ; 3
1 \text{ hour} ; 1 \text{ min}
2\text{ L} ; 2\text{ mL}
(-\infty,-1)\cup(1,\infty) ; x<-1 or x>2
(-\infty,-1)\cup(1,\infty) ; x<-1 or x\geq 1
(-\infty,-1)\cup(1,\infty) ; x<-1 and x>1
(-\infty,-1)\cup(1,\infty) ; y<-1 or x>1
x<-1 or x>1 ; y<-1 or y>1
(-\infty,1)\cup[2,3) ; x<1 or 2<x\leq 3
1,2 ; x=1, x=3
1,2 ; x=1
1,2 ; a=1, b=2
x=1, x=2 ; y=1, y=2
x=1, x=2 ; x=1
5 ; x=5 or x=6
1,2 ; x=1,000, x=2
12 ; twenty
12 ; twelve or thirteen
1 ; one cannot say
24 ; four twenty
22 ; two two
5 ; minus five
11:30\text{ a.m.} ; 11:30 PM
\frac{3\pm\sqrt{5}}{2} ; \frac{3+\sqrt5}{2}
\frac{3\pm\sqrt{5}}{2} ; \frac{3+\sqrt5}{2}, \frac{3+\sqrt5}{2}
\frac{3\pm\sqrt{5}}{2} ; \frac{3+\sqrt5}{2}, \frac{3-\sqrt7}{2}
(1,3) ; x>1 and x<4
(1,3) ; x>1 and x>3
(1,3) ; x\geq 1 and x<3
(1,3) ; x>1 and y<3
(1,3) ; x>1 or x<3
\text{seven} ; 8
33\frac13\% ; 33
33\frac13\% ; 33.33\%
\frac{1}{3} ; 33\%
50 ; 0.5\%
7 ; 7:1
7:1 ; 7
7:1 ; 1:7
1:2 ; 0.5
\sqrt{2}:1 ; \sqrt{2}
12 ; 12:00
{1}{2} ; 12
"""


def pairs(table):
    return [tuple(line.split(" ; ")) for line in table.strip().splitlines()]


@pytest.fixture(scope="module")
def same():
    verify = open_verifier()

    def grade(gold, answer):
        settled = [settle(text, answer) for text in gold_answers(gold)]
        return True in settled or any(verify(text, answer) for text, known in zip(gold_answers(gold), settled)
                                      if known is None)

    return grade


@pytest.mark.parametrize("gold, answer", pairs(SAME))
def test_right_answers_score(same, gold, answer):
    assert same(gold, answer)


@pytest.mark.parametrize("gold, answer", pairs(DIFFERENT))
def test_wrong_answers_do_not(same, gold, answer):
    assert not same(gold, answer)


def test_a_gold_answer_as_gsm8k_publishes_it(same):
    assert gold_answers("3+4=<<3+4=7>>7\n#### 7") == ("7",) and gold_answers("#### 1,234\n") == ("1,234",)
