// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// plot is a diagram with logarithmic axes.
type plot struct {
	title, file string
	x, y        string // what the axes are
	series      []series
}

type series struct {
	name string
	x, y []float64
}

// svg draws it, for light and dark pages.
func (p plot) svg() string {
	const width, height, left, right, top, bottom = 640, 360, 80, 170, 36, 52
	colours := []string{"#2a7de1", "#d9822b", "#2e9e5b", "#b0409a", "#7a7a7a"}
	lo := [2]float64{math.Inf(1), math.Inf(1)}
	hi := [2]float64{math.Inf(-1), math.Inf(-1)}
	for _, s := range p.series {
		for i := range s.x {
			for axis, v := range [2]float64{s.x[i], s.y[i]} {
				lo[axis], hi[axis] = min(lo[axis], v), max(hi[axis], v)
			}
		}
	}
	for axis := range lo { // whole decades
		lo[axis], hi[axis] = math.Floor(math.Log10(lo[axis])), math.Ceil(math.Log10(hi[axis]))
		if hi[axis] == lo[axis] {
			hi[axis]++
		}
	}
	at := func(axis int, v float64) float64 {
		part := (math.Log10(v) - lo[axis]) / (hi[axis] - lo[axis])
		if axis == 0 {
			return left + part*(width-left-right)
		}
		return height - bottom - part*(height-top-bottom)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<style>text{fill:#333}.grid{stroke:#999;stroke-opacity:.35}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>`+"\n")
	fmt.Fprintf(&b, `<text x="%d" y="20" font-size="14">%s</text>`+"\n", left, html.EscapeString(p.title))
	for axis := range lo {
		for d := lo[axis]; d <= hi[axis]; d++ {
			v := at(axis, math.Pow(10, d))
			if axis == 0 {
				fmt.Fprintf(&b, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", v, v, top, height-bottom, v, height-bottom+18, decade(d))
			} else {
				fmt.Fprintf(&b, `<line class="grid" y1="%.1f" y2="%.1f" x1="%d" x2="%d"/><text y="%.1f" x="%d" text-anchor="end">%s</text>`+"\n", v, v, left, width-right, v+4, left-8, decade(d))
			}
		}
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", left+(width-left-right)/2, height-12, html.EscapeString(p.x))
	fmt.Fprintf(&b, `<text transform="translate(16 %d) rotate(-90)" text-anchor="middle">%s</text>`+"\n", top+(height-top-bottom)/2, html.EscapeString(p.y))
	for i, s := range p.series {
		colour := colours[i%len(colours)]
		var points []string
		for k := range s.x {
			x, y := at(0, s.x[k]), at(1, s.y[k])
			points = append(points, fmt.Sprintf("%.1f,%.1f", x, y))
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", x, y, colour)
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="%s"/>`+"\n", colour, strings.Join(points, " "))
		y := top + 14 + 18*i
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="10" height="10" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n", width-right+14, y-9, colour, width-right+30, y, html.EscapeString(s.name))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// decade writes a power of ten.
func decade(d float64) string {
	if d >= -3 && d <= 4 {
		return fmt.Sprintf("%g", math.Pow(10, d))
	}
	return fmt.Sprintf(`10<tspan dy="-5" font-size="9">%g</tspan>`, d)
}
